"""What both training scripts do around their loops: the encoder to start from, saving and resuming."""

import argparse
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from shared import distributed
from shared.images.loading import EpochBatchSampler
from shared.networks.weights import safe_load
from shared.run.checkpoint import restore
from shared.run.run import Run

from ..encoder import Retriever, load_retriever, pack_architecture
from .pairs import StepSampler

BATCH = ("q_tokens", "q_mask", "k_tokens", "k_mask")  # as the networks take them
# differ between attempts at the same run: not part of the recipe that a checkpoint keeps
OF_THE_ATTEMPT = ("output_dir", "num_workers", "device", "dist_url", "dist_timeout", "local_rank", "main_port")


def start_retriever(args: argparse.Namespace, device: torch.device) -> Retriever:
    """The encoder that ``--model_path`` or else ``--retriever_model_id`` names, ready to be trained."""
    options = {"pooling": args.pooling, "allow_download": args.allow_download, "device": device}
    if args.model_path == "none":
        retriever = load_retriever(args.retriever_model_id, random_init=args.random_init, **options)
    else:
        file = official_checkpoint(args.model_path)
        path = file if file.exists() else args.model_path
        retriever = load_retriever(path, architecture=args.retriever_model_id, **options)
    width = retriever.dim
    if args.projection_size not in (None, width):
        raise ValueError(f"--projection_size {args.projection_size}: the encoder is {width} wide and has no projection")
    if retriever.model.projections:
        raise ValueError(f"{retriever.origin} has dense layers after its pooling: such encoders are not trained here")
    # what is written at the end describes this training, not the one before
    retriever.normalized = args.norm_query and args.norm_doc
    retriever.default_length, retriever.lowercase, retriever.prompts = None, False, {}
    for module in retriever.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = args.dropout
    config = retriever.model.config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = args.dropout
    return retriever


@dataclass(frozen=True)
class TrainingData:
    """The batches of this process, and what a run needs to know of all of them.

    Attributes:
        batch_size: Queries per step, on all processes.
        checksum: Stands for the training text, to notice that a run goes on with another one.
    """

    loader: DataLoader
    sampler: StepSampler | EpochBatchSampler
    steps_per_epoch: int
    batch_size: int
    checksum: str | int


def to_official(state: dict, steps_per_epoch: int, architecture: dict) -> dict:
    """The entries of the official checkpoints, and what makes the file readable without any other one."""
    flags = state["args"]
    step = min(state["epoch"] * steps_per_epoch + state["step_in_epoch"], flags["total_steps"])
    return {
        **{name: value for name, value in state.items() if name != "images"},
        "step": step,
        "scheduler": {"last_epoch": step, "_step_count": step + 1, "base_lrs": [flags["lr"]]},
        "opt": {flag: value for flag, value in flags.items() if flag not in OF_THE_ATTEMPT},
        **architecture,
        "text": state["images"],
        "total_steps": flags["total_steps"],
    }


def from_official(checkpoint: dict, args: argparse.Namespace, data: TrainingData) -> dict:
    """A checkpoint as :meth:`shared.run.run.Run.resume` reads it; the length of this training is counted in steps."""
    facts = {"batch_size": data.batch_size, "world_size": distributed.get_world_size()}
    facts |= {"text": data.checksum, "total_steps": args.total_steps}
    # files of the reference state none of these, and no place in an epoch
    changes = [
        f"{key} was {checkpoint[key]!r}, is {value!r}"
        for key, value in facts.items()
        if checkpoint.get(key, value) != value
    ]
    other_text = checkpoint.get("text", data.checksum) != data.checksum
    if changes and (args.on_changed_run == "refuse" or (other_text and args.on_changed_run == "same_data")):
        way_on = "; name another --output_dir, or go on all the same with --on_changed_run continue"
        raise ValueError(f"--on_changed_run {args.on_changed_run}: {'; '.join(changes)}{way_on}")
    if changes:
        distributed.print_once(f"resuming a changed run; draws differ from here on: {'; '.join(changes)}")
    checkpoint = {**checkpoint, **facts, "images": data.checksum}
    if changes or "epoch" not in checkpoint:
        checkpoint["epoch"], checkpoint["step_in_epoch"] = divmod(checkpoint["step"], data.steps_per_epoch)
    return checkpoint


def resume(
    run: Run,
    data: TrainingData,
    network_flags: tuple[str, ...],
    retriever: Retriever,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Go on where the newest checkpoint was written, or where ``--continue_training`` says, or start."""
    args = run.args
    facts = {"steps_per_epoch": data.steps_per_epoch, "architecture": pack_architecture(retriever)}
    run.resume(
        data,
        args.total_steps,
        network_flags,
        to_official=partial(to_official, **facts),
        from_official=partial(from_official, args=args, data=data),
        model=model,
        optimizer=optimizer,
    )
    run.log.unit = "pairs"
    if run.is_new and args.continue_training:
        file = official_checkpoint(args.model_path)
        checkpoint = safe_load(file)
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("step"), int):
            raise ValueError(f"--continue_training: {file} is no checkpoint of a training, it has no step")
        restore(checkpoint, model=model, optimizer=optimizer)
        run.epoch, run.step_in_epoch = divmod(checkpoint["step"], data.steps_per_epoch)
        distributed.print_once(f"continuing {args.model_path} at step {checkpoint['step']}")


def official_checkpoint(path: str | Path) -> Path:
    """The file of ``--model_path``, or the newest one of an official output folder.

    The reference's link ``checkpoint/latest`` points nowhere when the folder was given as a relative path; its name is
    right all the same.
    """
    path = Path(path)
    latest = path / "checkpoint" / "latest"
    if latest.is_symlink() and not (path / "checkpoint.pth").exists():
        path = latest.with_name(Path(os.readlink(latest)).name)
    return path if path.is_file() else path / "checkpoint.pth"


def link_latest(run: Run) -> None:
    """Make ``checkpoint/latest``, the official name of the newest checkpoint's folder, once there is a checkpoint."""
    latest = run.output_dir / "checkpoint" / "latest"
    link = latest / run.path.name
    if run.path.exists() and not link.is_symlink():
        latest.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)  # in a copy of a run it is the file itself, as it was then
        link.symlink_to(Path("..", "..", run.path.name))


def finish(run: Run, retriever: Retriever) -> None:
    """Leave the trained encoder, and the official name of the last checkpoint."""
    link_latest(run)
    retriever.save(run.output_dir / "encoder")


def keep_numbered(run: Run) -> None:
    """Every ``--save_freq`` steps the checkpoint also stays as ``checkpoint/step-<n>/checkpoint.pth``."""
    if distributed.is_main_process():
        link_latest(run)
    step, every_steps = run.steps_done, run.args.save_freq
    if every_steps and step % every_steps == 0 and run.guard.is_good():
        name = f"checkpoint/step-{step}/checkpoint.pth"
        if distributed.is_main_process():
            (run.output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        run.save(keep_as=name)
