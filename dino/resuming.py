"""Everything that a checkpoint of a training holds."""

import argparse
from dataclasses import dataclass

import torch
from torch import nn

from shared import distributed
from shared.batchnorm import has_batchnorm
from shared.checkpoint import check_flags, restore, resume_position
from shared.metrics import RunLog
from shared.multicrop import MultiCropWrapper
from shared.not_finite import FiniteGuard
from shared.precision import Precision
from shared.training_data import TrainingData

from .losses import DINOLoss

NETWORK_FLAGS = (
    "arch",
    "patch_size",
    "global_crop_size",
    "in_chans",
    "out_dim",
    "use_bn_in_head",
    "norm_last_layer",
    "optimizer",
)


@dataclass
class Resumable:
    """The parts of a training that its checkpoints hold.

    Attributes:
        guard: Set once the networks are loaded, for it remembers their running statistics.
    """

    args: argparse.Namespace
    data: TrainingData
    student: nn.Module
    teacher: MultiCropWrapper
    criterion: DINOLoss
    optimizer: torch.optim.Optimizer
    precision: Precision
    log: RunLog
    guard: FiniteGuard | None = None

    def state(self, epoch: int, step_in_epoch: int) -> dict:
        """Where to go on and with what; the first keys are those of the official checkpoints."""
        student = distributed.unwrap(self.student).state_dict()
        teacher_prefix = "module." if has_batchnorm(self.teacher) else ""  # as in the official files
        return {
            "student": {f"module.{name}": value for name, value in student.items()},
            "teacher": {teacher_prefix + name: value for name, value in self.teacher.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "epoch": epoch,
            "args": vars(self.args),
            "dino_loss": self.criterion.state_dict(),
            "fp16_scaler": self.precision.scaler.state_dict(),
            "step_in_epoch": step_in_epoch,
            "skipped_steps": int(self.guard.in_a_row),
            "batch_size": self.data.batch_size,
            "world_size": distributed.get_world_size(),
            "images": self.data.checksum,
            "log": self.log.state_dict(),
        }

    def load(self, checkpoint: dict) -> tuple[int, int]:
        """Take everything from a checkpoint, ours or an official one; returns the epoch and the step in it to go on at.

        Raises:
            ValueError: If it was written with another network.
        """
        check_flags(checkpoint, self.args, NETWORK_FLAGS)
        restore(
            checkpoint,
            student=distributed.unwrap(self.student),
            teacher=self.teacher,
            optimizer=self.optimizer,
            dino_loss=self.criterion,
        )
        if checkpoint.get("fp16_scaler"):
            self.precision.scaler.load_state_dict(checkpoint["fp16_scaler"])
        if "log" in checkpoint:  # the official checkpoints have none
            self.log.load_state_dict(checkpoint["log"])
        position = resume_position(checkpoint, self.data.batch_size, self.data.checksum, self.args.on_changed_run)
        distributed.print_once("resuming at epoch {}, step {}".format(*position))
        return position
