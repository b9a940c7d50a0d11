"""What both training scripts do around their loops: the encoder to start from, the optimiser, saving and resuming."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from shared import distributed
from shared.networks.weights import safe_load
from shared.optimisation.optim import clip_grad_norm_per_tensor_, step_unless_not_finite
from shared.optimisation.precision import Precision
from shared.run.checkpoint import Checkpointer, check_flags, load_latest, restore
from shared.run.log import RunLog
from shared.run.not_finite import FiniteGuard

from .encoder import Retriever, load_retriever, pack_architecture
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


class Resumable:
    """A training that goes on where its newest checkpoint was written, or where ``--continue_training`` says.

    Args:
        args: Flags of either training script.
        model: What is trained, under the names that the files have.
        networks: Searched when losses stay NaN, see :class:`shared.run.not_finite.FiniteGuard`.
        epoch_steps: Steps of an epoch.
        text: Stands for the training text, to notice that a run goes on with another one.
        must_match: Flags that a checkpoint's run must have had alike.

    Attributes:
        log: Of the run.
        guard: Of the run.
        first_epoch, first_step: Where the training goes on, the step counted within the epoch.
        is_new: Whether no checkpoint was there.

    Raises:
        ValueError: If a checkpoint's run had other flags, or is to be refused as changed.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        output_dir: Path,
        retriever: Retriever,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        networks: dict[str, nn.Module],
        epoch_steps: int,
        text: str | int,
        must_match: tuple[str, ...],
    ):
        self.args, self.model, self.optimizer, self.precision = args, model, optimizer, precision
        self.epoch_steps, self.path = epoch_steps, output_dir / "checkpoint.pth"
        self.architecture = pack_architecture(retriever)
        world_size = distributed.get_world_size()
        self.facts = {
            "batch_size": args.per_gpu_batch_size * world_size,
            "world_size": world_size,
            "text": text,
            "total_steps": args.total_steps,
        }
        checkpoint = load_latest(self.path)
        self.is_new = checkpoint is None
        self.log = RunLog(output_dir, args.total_steps, args.log_freq, args.tensorboard, resumed=not self.is_new)
        self.first_epoch, self.first_step = 0, 0
        if checkpoint is not None:
            self._resume(checkpoint, must_match)
        elif args.continue_training:
            step = continue_from(args.model_path, model, optimizer)
            self.first_epoch, self.first_step = divmod(step, epoch_steps)
            distributed.print_once(f"continuing {args.model_path} at step {step}")
        in_a_row = 0 if checkpoint is None else checkpoint["skipped_steps"]
        self.guard = FiniteGuard(networks, output_dir, args.max_skipped_steps, precision.device, in_a_row=in_a_row)

    def _resume(self, checkpoint: dict, must_match: tuple[str, ...]) -> None:
        check_flags(checkpoint, self.args, must_match)
        restore(checkpoint, model=self.model, optimizer=self.optimizer)
        if checkpoint["fp16_scaler"]:
            self.precision.scaler.load_state_dict(checkpoint["fp16_scaler"])
        self.log.load_state_dict(checkpoint["log"])
        place = resume_at(checkpoint, self.facts, self.epoch_steps, self.args.on_changed_run)
        self.first_epoch, self.first_step = place
        distributed.print_once(f"resuming at step {checkpoint['step']}")

    def state(self, epoch: int, step_in_epoch: int) -> dict:
        """Everything that the run needs to go on at this step."""
        step = min(epoch * self.epoch_steps + step_in_epoch, self.args.total_steps)
        return {
            **training_state(self.model, self.optimizer, self.architecture, self.args, step),
            "epoch": epoch,
            "step_in_epoch": step_in_epoch,
            "fp16_scaler": self.precision.scaler.state_dict(),
            "skipped_steps": int(self.guard.in_a_row),
            **self.facts,
            "log": self.log.state_dict(),
        }

    def checkpointer(self) -> Checkpointer:
        """Writes :meth:`state`."""
        args = self.args
        return Checkpointer(self.path, self.state, args.saveckp_steps, args.saveckp_minutes, self.guard.is_good)


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
