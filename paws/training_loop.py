"""The loop of the programs whose loss is a function of one batch: SuNCEt and the two kinds of fine-tuning."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shared import distributed
from shared.optimisation.optim import clip_grad_norm_per_tensor_, step_unless_not_finite
from shared.optimisation.precision import Precision
from shared.run import randomness
from shared.run.checkpoint import Checkpointer, check_flags, restore, resume_position
from shared.run.log import RunLog
from shared.run.not_finite import FiniteGuard


@dataclass
class StepLoss:
    """What a step computes.

    Attributes:
        loss: 0-d, float32.
        parts: Further quantities for the log.
        views: What the encoder has seen, to find the first tensor that is not finite.
        images: Images of this process that count for the speed.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    views: list[Tensor]
    images: int


@dataclass
class Loop:
    """Everything that stays the same from epoch to epoch."""

    encoder: nn.Module
    optimizer: torch.optim.Optimizer
    rates: np.ndarray
    steps_per_epoch: int
    seed: int
    precision: Precision
    log: RunLog
    guard: FiniteGuard
    checkpointer: Checkpointer

    def epoch(
        self, batches: Iterable, step_loss: Callable[[object, int], StepLoss], epoch: int, first_step: int
    ) -> None:
        """One epoch, from its step ``first_step`` on.

        Args:
            batches: What the loaders yield.
            step_loss: Called as ``step_loss(batch, epoch)``; runs the encoder.
        """
        parameters = list(self.encoder.parameters())
        start = epoch * self.steps_per_epoch + first_step
        for step, batch in enumerate(self.log.batches(batches), start=start):
            randomness.seed_step(self.seed, step, distributed.get_rank())
            for group in self.optimizer.param_groups:
                group["lr"] = float(self.rates[step])
            self.optimizer.zero_grad(set_to_none=True)
            found = step_loss(batch, epoch)
            self.precision.backward(found.loss, self.optimizer)
            norms = clip_grad_norm_per_tensor_(parameters, max_norm=0)
            skipped = step_unless_not_finite(self.optimizer, norms)
            self.precision.update()
            self.guard.count(skipped)
            averages = {"loss": found.loss, **found.parts, "lr": self.rates[step], "skipped": skipped}
            line = self.log.step(step, epoch, found.images, averages)
            if line is not None and self.guard.too_many():
                saved = {"views": found.views, "step": step, "epoch": epoch}
                self.guard.stop(saved, found.views, {"encoder": found.views}, found.loss)
            self.checkpointer.after_step(epoch, step + 1 - epoch * self.steps_per_epoch)


@dataclass
class FineTuning:
    """What the checkpoints of both kinds of fine-tuning hold.

    Attributes:
        images: Checksum of the images.
        pretrained: Checksum of the weights that the run started from.
        batch_size: Of all processes.
        best: Best top-1 of all evaluations, in percent.
        guard: Set once the encoder is loaded, for it remembers the running statistics.
    """

    args: argparse.Namespace
    encoder: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    log: RunLog
    images: int
    pretrained: int
    batch_size: int
    best: float = 0.0
    guard: FiniteGuard | None = None

    def state(self, epoch: int, step_in_epoch: int) -> dict:
        """Everything a run needs to go on at this step; the first keys are those of the official checkpoints."""
        return {
            "encoder": self.encoder.state_dict(),
            "opt": self.optimizer.state_dict(),
            "epoch": epoch,
            "unlabel_prob": self.args.unlabeled_frac,
            "world_size": distributed.get_world_size(),
            "best_top1_acc": self.best,
            "batch_size": self.batch_size,
            "lr": self.args.lr,
            "amp": self.precision.scaler.state_dict(),
            "args": vars(self.args),
            "step_in_epoch": step_in_epoch,
            "skipped_steps": int(self.guard.in_a_row),
            "images": self.images,
            "pretrained": self.pretrained,
            "log": self.log.state_dict(),
        }

    def load(self, checkpoint: dict, path: Path, must_match: tuple[str, ...]) -> tuple[int, int]:
        """Take everything from a checkpoint; returns the epoch and the step in it to go on at.

        Args:
            path: Of the checkpoint, for messages.
            must_match: Flags that may not have changed.

        Raises:
            ValueError: If it is not one of this run.
        """
        if checkpoint.get("pretrained") != self.pretrained:
            raise ValueError(f"{path} started from other weights than those of --pretrained; use another --output_dir")
        check_flags(checkpoint, self.args, must_match)
        restore(checkpoint, encoder=self.encoder, opt=self.optimizer)
        self.precision.scaler.load_state_dict(checkpoint["amp"])
        self.log.load_state_dict(checkpoint["log"])
        self.best = checkpoint["best_top1_acc"]
        position = resume_position(checkpoint, self.batch_size, self.images, self.args.on_changed_run)
        distributed.print_once("resuming at epoch {}, step {}".format(*position))
        return position


def new_guard(encoder: nn.Module, output_dir: Path, most: int, device: torch.device, checkpoint: dict | None):
    """A :class:`FiniteGuard` that goes on with the count of the checkpoint."""
    in_a_row = checkpoint.get("skipped_steps", 0) if checkpoint else 0
    return FiniteGuard({"encoder": distributed.unwrap(encoder)}, output_dir, most, device, in_a_row)
