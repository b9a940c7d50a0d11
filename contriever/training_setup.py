"""What both training scripts do around their loops: the encoder to start from, the optimiser, evaluations, saving."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from shared import distributed
from shared.checkpoint import Checkpointer, restore
from shared.optim import clip_grad_norm_per_tensor_, step_unless_not_finite
from shared.precision import Precision
from shared.weights import safe_load

from .encoder import Retriever, load_retriever
from .sam import SharpnessAware
from .schedules import SCHEDULES

NETWORK_FLAGS = ("pooling", "random_init", "contrastive_mode", "queue_size")
# differ between attempts at the same run: not part of the recipe that a checkpoint keeps
OF_THE_ATTEMPT = ("output_dir", "num_workers", "device", "dist_url", "dist_timeout", "local_rank", "main_port")


def start_retriever(args: argparse.Namespace, device: torch.device) -> Retriever:
    """The encoder that ``--model_path`` or else ``--retriever_model_id`` names, ready to be trained.

    Raises:
        ValueError: If ``--projection_size`` is not its width.
    """
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
    retriever.normalized = args.norm_query and args.norm_doc
    set_dropout(retriever.model, args.dropout)
    return retriever


def set_dropout(network: nn.Module, p: float) -> None:
    """Probability of every dropout layer, and of the attention's."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    network.config.hidden_dropout_prob = network.config.attention_probs_dropout_prob = p


def build_optimizer(module: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW over all parameters in one group, biases and norms among them; the key encoder's never get a gradient."""
    return torch.optim.AdamW(
        module.parameters(),
        lr=0.0,
        betas=(args.beta1, args.beta2),
        eps=args.eps,
        weight_decay=args.weight_decay,
        fused=True,
    )


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Of the update that follows ``step`` others."""
    return args.lr * SCHEDULES[args.scheduler](step, args.warmup_steps, args.total_steps, args.lr_min_ratio)


def update(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    lr: float,
    precision: Precision,
    sharpness: SharpnessAware | None = None,
) -> Tensor:
    """Backward pass and one step of the optimiser, left out when a gradient is not finite.

    Args:
        sharpness: Has moved the weights to where the loss was taken; they go back before the step.

    Returns:
        1.0 where it was left out, else 0.0 (0-d).
    """
    precision.backward(loss, optimizer)
    if sharpness is not None:
        sharpness.descend()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norms = clip_grad_norm_per_tensor_(parameters, 0)  # measures only: the method does not clip
    for group in optimizer.param_groups:
        group["lr"] = lr
    skipped = step_unless_not_finite(optimizer, grad_norms)
    precision.update()
    return skipped


class OnPair(nn.Module):
    """An encoder that takes (ids, mask) as one argument, for the search for what is not finite."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.encoder(*pair)


def training_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, architecture: dict, args: argparse.Namespace, step: int
) -> dict:
    """The entries of the official checkpoints, and what makes the file readable without any other one.

    Args:
        architecture: From :func:`contriever.encoder.pack_architecture`.
        step: Updates done.
    """
    flags = vars(args)
    return {
        "step": step,
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": step, "_step_count": step + 1, "base_lrs": [args.lr]},
        "opt": {flag: value for flag, value in flags.items() if flag not in OF_THE_ATTEMPT},
        **architecture,
        "args": flags,
    }


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


def continue_from(path: str | Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """``--continue_training``: fill network and optimiser from a checkpoint, ours or an official one; its step.

    Raises:
        ValueError: If it is not the checkpoint of such a training.
    """
    file = official_checkpoint(path)
    checkpoint = safe_load(file)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("step"), int):
        raise ValueError(f"--continue_training: {file} is no checkpoint of a training, it has no step")
    restore(checkpoint, model=module, optimizer=optimizer)
    return checkpoint["step"]


def resume_at(checkpoint: dict, facts: dict, epoch_steps: int, on_changed_run: str) -> tuple[int, int]:
    """(epoch, step in the epoch) at which a run goes on.

    Args:
        facts: Batch, processes, text and length of this run, under their keys in the checkpoint.
        epoch_steps: Steps of an epoch now.

    Raises:
        ValueError: If a fact differs and ``on_changed_run`` is ``refuse``.
    """
    changes = [
        f"{key} was {checkpoint[key]!r}, is {value!r}" for key, value in facts.items() if checkpoint[key] != value
    ]
    if not changes:
        return checkpoint["epoch"], checkpoint["step_in_epoch"]
    if on_changed_run == "refuse":
        raise ValueError(f"--on_changed_run refuse: {'; '.join(changes)}")
    distributed.print_once(f"resuming a changed run; draws differ from here on: {'; '.join(changes)}")
    return divmod(checkpoint["step"], epoch_steps)


def link_latest(output_dir: Path) -> None:
    """Make ``checkpoint/latest``, the official name of the newest checkpoint's folder."""
    latest = output_dir / "checkpoint" / "latest"
    if not latest.is_symlink() and not latest.exists():
        latest.symlink_to("..", target_is_directory=True)


def save(checkpointer: Checkpointer, epoch: int, step_in_epoch: int, step: int, save_freq: int) -> None:
    """Save what is due after a step, and stop if a signal has arrived.

    Every ``save_freq`` steps the file also stays as ``checkpoint/step-<n>/checkpoint.pth``; first of all, since a run
    that has saved otherwise does not come back to this step.
    """
    if save_freq and step % save_freq == 0 and checkpointer.is_good():
        name = f"checkpoint/step-{step}/checkpoint.pth"
        if distributed.is_main_process():
            (checkpointer.path.parent / name).parent.mkdir(parents=True, exist_ok=True)
        checkpointer.save(epoch, step_in_epoch, keep_as=name)
    checkpointer.after_step(epoch, step_in_epoch)


@dataclass(frozen=True)
class Objective:
    """Numbers of the loss, and the learning rate of each step.

    Attributes:
        temperature: Divisor of the scores.
        label_smoothing: In the cross entropy.
        norm_query, norm_doc: Divide vectors by their norms.
        lr: Learning rate after so many updates.
        momentum: Of the key encoder (MoCo).
    """

    temperature: float
    label_smoothing: float
    norm_query: bool
    norm_doc: bool
    lr: Callable[[int], float]
    momentum: float = 0.0

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Objective":
        return cls(
            args.temperature,
            args.label_smoothing,
            args.norm_query,
            args.norm_doc,
            partial(learning_rate, args),
            getattr(args, "momentum", 0.0),
        )
