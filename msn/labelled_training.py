"""What linear evaluation and fine-tuning have in common around their epochs: losses, log, checkpoints, validation."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from shared import distributed
from shared.images.loading import EvalDataset
from shared.optimisation.precision import Precision
from shared.run.checkpoint import Checkpointer, load_latest, restore, resume_position
from shared.supervised.evaluation import evaluate_classifier


def mean_loss(total: Tensor) -> float:
    """Mean over the images of all processes.

    Args:
        total: Sum of the losses of this process's images, and their number; shape (2,), float64.

    Raises:
        ValueError: If it is not finite.
    """
    loss, images = distributed.all_reduce_sum(total).tolist()
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}; try a smaller --lr")
    return loss / max(images, 1)


@dataclass
class LabelledTraining:
    """A training with labels, which goes on at the step where it stopped.

    Attributes:
        args: Flags ``batch_size``, ``lr``, ``output_dir``, ``num_workers``, ``saveckp_steps``, ``saveckp_minutes``, and
            those of ``must_match``.
        name: Of the files in the output folder: ``<name>.pth.tar``, and ``<name>.txt`` with a line of JSON per epoch.
        parts: What learns, by its key in the checkpoint.
        precision: Of the training; holds the gradient scaler.
        must_match: Flags that a run which is resumed must have as they were.
        images: Checksum of the training images.
        pretrained: Checksum of the weights of the encoder at the start.
        steps_per_epoch: Steps of a whole epoch.
        frozen: What does not learn, and is in the checkpoint for others to use.
        first_epoch, first_step: Where to go on.
        best_acc: Best top-1 of all validations, in percent.
        log: A line per finished epoch.
        epoch_loss: Sum of the losses of this process's images in the present epoch, and their number.
    """

    args: argparse.Namespace
    name: str
    parts: dict[str, nn.Module | torch.optim.Optimizer]
    precision: Precision
    must_match: Sequence[str]
    images: int
    pretrained: int
    steps_per_epoch: int
    frozen: dict[str, nn.Module] = field(default_factory=dict)
    first_epoch: int = 0
    first_step: int = 0
    best_acc: float = 0.0
    log: list[dict] = field(default_factory=list)
    epoch_loss: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.epoch_loss = torch.zeros(2, dtype=torch.double, device=self.precision.device)

    @property
    def path(self) -> Path:
        """Of the checkpoint."""
        return Path(self.args.output_dir) / f"{self.name}.pth.tar"

    def state(self, epoch: int, step_in_epoch: int) -> dict:
        """Where to go on and with what, as :class:`Checkpointer` wants it.

        Raises:
            ValueError: If the loss is not finite.
        """
        mean_loss(self.epoch_loss)
        kept = {name: part.state_dict() for name, part in (self.frozen | self.parts).items()}
        return kept | {
            "epoch": epoch,
            "world_size": distributed.get_world_size(),
            "best_top1_acc": self.best_acc,
            "batch_size": self.args.batch_size,  # of one process, as in the official files
            "lr": self.args.lr,
            "fp16_scaler": self.precision.scaler.state_dict(),
            "flags": {name: getattr(self.args, name) for name in self.must_match},
            "pretrained": self.pretrained,
            "log": self.log,
            "step_in_epoch": step_in_epoch,
            "images": self.images,
            "epoch_loss": distributed.all_gather(self.epoch_loss[None]).cpu(),  # (processes, 2)
        }

    def resume(self) -> bool:
        """Take everything from the newest checkpoint; whether there is one.

        Raises:
            ValueError: If it is not one of this run.
        """
        checkpoint = load_latest(self.path)
        if checkpoint is None:
            return False
        self._check_same_run(checkpoint)
        restore(checkpoint, **self.parts)
        if checkpoint.get("fp16_scaler"):
            self.precision.scaler.load_state_dict(checkpoint["fp16_scaler"])
        self.best_acc, self.log = checkpoint.get("best_top1_acc", 0.0), checkpoint.get("log", [])
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        if "step_in_epoch" in checkpoint:
            checkpoint["batch_size"] *= checkpoint["world_size"]
            self.epoch_loss += checkpoint["epoch_loss"][rank::world_size].sum(dim=0).to(self.epoch_loss)
        else:  # the official files, which are written between epochs
            checkpoint["batch_size"] = self.args.batch_size * world_size
        self.first_epoch, self.first_step = resume_position(
            checkpoint, self.args.batch_size * world_size, self.images, on_changed_run="continue"
        )
        return True

    def _check_same_run(self, checkpoint: dict) -> None:
        """Raise ``ValueError`` unless the checkpoint belongs to this run; official ones do not say."""
        if not self.parts.keys() <= checkpoint.keys() or "prototypes" in checkpoint:
            raise ValueError(f"{self.path} is a checkpoint of another script; choose another --output_dir")
        if checkpoint.get("pretrained", self.pretrained) != self.pretrained:
            raise ValueError(f"{self.path} started from the features of other weights; use another --output_dir")
        for flag, value in checkpoint.get("flags", {}).items():
            if getattr(self.args, flag) != value:
                raise ValueError(
                    f"--{flag} {getattr(self.args, flag)} does not fit {self.path}, which was written with --{flag} "
                    f"{value}; use that or another --output_dir"
                )

    def checkpointer(self) -> Checkpointer:
        """Saves by the flags, on signals, and at the end of epochs, also beside a training that goes on."""
        args = self.args
        return Checkpointer(self.path, self.state, args.saveckp_steps, args.saveckp_minutes, owns_folder=False)

    def validate(
        self, network: nn.Module, val_set: EvalDataset, checkpointer: Checkpointer | None = None, epoch: int = 0
    ) -> dict[str, float]:
        """``loss``, ``acc1`` and ``acc5`` over all images, each counted once; accuracies in percent.

        Args:
            network: Images to logits.
            checkpointer: Saves and stops between batches if it is asked to.
            epoch: That has ended.
        """
        stop = checkpointer and partial(checkpointer.stop_if_asked, epoch, self.steps_per_epoch)
        in_float32 = Precision("fp32", self.precision.device)
        return evaluate_classifier(network, val_set, in_float32, self.args.batch_size, self.args.num_workers, stop)

    def end_epoch(self, line: dict, result: dict[str, float] | None, checkpointer: Checkpointer) -> None:
        """Log an epoch and its validation, if there was one, and save.

        Args:
            line: At least ``epoch``.
        """
        if result is not None:
            self.best_acc = max(self.best_acc, result["acc1"])
            line |= {f"test_{name}": value for name, value in result.items()} | {"best_acc1": self.best_acc}
        self.log.append(line)
        self.epoch_loss.zero_()
        distributed.print_once("  ".join(f"{name} {value:.5g}" for name, value in line.items()))
        if distributed.is_main_process():
            log_path = Path(self.args.output_dir) / f"{self.name}.txt"
            log_path.write_text("".join(json.dumps(line) + "\n" for line in self.log))
        checkpointer.after_epoch(line["epoch"])

    def result_line(self, result: dict[str, float]) -> str:
        """The result, for a person."""
        return (
            f"Top-1 accuracy after the last epoch: {result['acc1']:.2f} % (top-5 {result['acc5']:.2f} %, "
            f"best top-1 of all epochs {self.best_acc:.2f} %)"
        )
