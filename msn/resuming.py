"""Everything that a checkpoint of a training holds."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from shared import distributed
from shared.images.training_data import TrainingData
from shared.optimisation.precision import Precision
from shared.run.checkpoint import check_flags, load_latest, restore, resume_position
from shared.run.log import RunLog
from shared.run.not_finite import FiniteGuard

from .vision_transformer import VisionTransformer

NETWORK_FLAGS = ("model_name", "patch_size", "rand_size", "in_chans", "hidden_dim", "output_dim", "use_bn", "num_proto")


def find_checkpoint(latest: Path, read_checkpoint: str | None, must_exist: bool) -> dict | None:
    """The newest state of this run, else the one to start from, else None.

    Raises:
        ValueError: If it was asked for and there is none.
    """
    checkpoint = load_latest(latest)
    if checkpoint is None and read_checkpoint is not None:
        checkpoint = load_latest(latest.parent / read_checkpoint)
        if checkpoint is None:
            raise ValueError(f"--read_checkpoint {read_checkpoint}: there is no such file in {latest.parent}")
    if checkpoint is None and must_exist:
        raise ValueError(f"--load_checkpoint true: there is no {latest}")
    return checkpoint


@dataclass
class Resumable:
    """The parts of a training that its checkpoints hold.

    Attributes:
        epoch_loss: Of the last complete epoch.
        guard: Set once the encoders are loaded, for it remembers their running statistics.
    """

    args: argparse.Namespace
    data: TrainingData
    encoder: nn.Module
    target_encoder: VisionTransformer
    prototypes: nn.Parameter
    optimizer: torch.optim.Optimizer
    precision: Precision
    log: RunLog
    epoch_loss: float | None = None
    guard: FiniteGuard | None = None

    def state(self, epoch: int, step_in_epoch: int) -> dict:
        """Where to go on and with what; the first keys are those of the official checkpoints."""
        prefix = "module." if distributed.get_world_size() > 1 else ""  # as in the official files
        encoder = distributed.unwrap(self.encoder)
        return {
            "encoder": {prefix + name: value for name, value in encoder.state_dict().items()},
            "opt": self.optimizer.state_dict(),
            "prototypes": self.prototypes.data,
            "target_encoder": {prefix + name: value for name, value in self.target_encoder.state_dict().items()},
            "epoch": epoch,
            "loss": self.epoch_loss,
            "batch_size": self.args.batch_size,
            "world_size": distributed.get_world_size(),
            "lr": self.args.lr,
            "temperature": self.args.temperature,
            "args": vars(self.args),
            "fp16_scaler": self.precision.scaler.state_dict(),
            "step_in_epoch": step_in_epoch,
            "skipped_steps": int(self.guard.in_a_row),
            "images": self.data.checksum,
            "log": self.log.state_dict(),
        }

    def load(self, checkpoint: dict) -> tuple[int, int]:
        """Take everything from a checkpoint, ours or an official one; returns the epoch and the step in it to go on at.

        Raises:
            ValueError: If it was written with another network.
        """
        if "args" in checkpoint:  # the official checkpoints have none
            check_flags(checkpoint, self.args, NETWORK_FLAGS)
        encoder = distributed.unwrap(self.encoder)
        restore(checkpoint, encoder=encoder, target_encoder=self.target_encoder, opt=self.optimizer)
        restore_prototypes(checkpoint, self.prototypes)
        if checkpoint.get("fp16_scaler"):
            self.precision.scaler.load_state_dict(checkpoint["fp16_scaler"])
        if "log" in checkpoint:
            self.log.load_state_dict(checkpoint["log"])
        self.epoch_loss = checkpoint["loss"]
        images_per_step = checkpoint["batch_size"] * checkpoint["world_size"]
        position = resume_position(
            checkpoint | {"batch_size": images_per_step},
            self.data.batch_size,
            self.data.checksum,
            self.args.on_changed_run,
        )
        distributed.print_once("resuming at epoch {}, step {}".format(*position))
        return position


def restore_prototypes(checkpoint: dict, prototypes: nn.Parameter) -> None:
    """Copy the prototypes of a checkpoint.

    Raises:
        ValueError: If it has none, or others.
    """
    saved = checkpoint.get("prototypes")
    if not isinstance(saved, Tensor) or saved.shape != prototypes.shape:
        found = tuple(saved.shape) if isinstance(saved, Tensor) else "none"
        raise ValueError(
            f"the checkpoint's prototypes do not fit this run: {found} instead of {tuple(prototypes.shape)}"
        )
    prototypes.data.copy_(saved)
