"""What supervised trainings have in common around their epochs: images, the state that is kept, tests in between."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from timm.data import Mixup
from torch import nn
from torch.utils.data import DataLoader

from shared import distributed
from shared.images.cache import cache_images
from shared.images.loading import BadImages, EpochBatchSampler, EvalDataset, default_num_workers, make_loader
from shared.images.sources import ImageSource
from shared.optimisation.precision import Precision
from shared.run.checkpoint import Checkpointer, check_flags, load_latest, restore, resume_position
from shared.run.log import RunLog
from shared.run.not_finite import FiniteGuard

from .data import LabelledViews, RepeatedAugmentationSampler
from .datasets import open_train_and_val
from .ema import NetworkEMA
from .evaluation import evaluate_classifier
from .flags import mixes_labels
from .transforms import eval_transform


@dataclass
class LabelledImages:
    """The images to train on and those to evaluate on.

    Attributes:
        checksum: Of the training images, the same on every process.
        bad_images: What becomes of training images that cannot be read.
        num_workers: Loader processes of this process.
        evaluate: Maps a network, and ``between_batches`` by name, to its accuracy on ``val``; see
            :func:`shared.supervised.evaluation.evaluate_classifier`.
    """

    train: ImageSource
    val: ImageSource
    checksum: int
    bad_images: BadImages
    num_workers: int
    evaluate: Callable[..., dict[str, float]]

    @property
    def num_classes(self) -> int:
        return len(self.train.classes)


def open_images(
    args: argparse.Namespace,
    output_dir: Path,
    precision: Precision,
    mean: Sequence[float],
    std: Sequence[float],
    crop_ratio: float,
) -> LabelledImages:
    """Open what ``--data-set``, ``--data_path`` and ``--val_path`` name.

    Args:
        args: Flags of :mod:`shared.supervised.flags` and :func:`shared.run.flags.add_data_flags`, and ``input_size``.
        output_dir: Unreadable images are listed in it, but with ``--eval``.
        mean, std: Of the images, per channel.
        crop_ratio: Side of the centre crop that is evaluated, over the short side of the image.
    """
    train, val = open_train_and_val(args)
    train = cache_images(train, args.cache)
    checksum = train.checksum()
    distributed.check_same_on_all_processes((len(train), checksum), "the training data (number of images, checksum)")
    bad_images, bad_val_images = (
        BadImages(len(source), None if args.eval else output_dir / listed, args.on_bad_image, args.max_bad_fraction)
        for source, listed in ((train, "bad_images.txt"), (val, "bad_images_val.txt"))
    )
    num_workers = default_num_workers() if args.num_workers is None else args.num_workers
    evaluate = partial(
        evaluate_classifier,
        dataset=EvalDataset(val, eval_transform(args.input_size, mean, std, crop_ratio, args.in_chans), bad_val_images),
        precision=precision,
        batch_size=int(1.5 * args.batch_size),
        num_workers=num_workers,
    )
    return LabelledImages(train, val, checksum, bad_images, num_workers, evaluate)


def train_loader(
    args: argparse.Namespace, views: LabelledViews, num_workers: int, device: torch.device
) -> tuple[DataLoader, EpochBatchSampler]:
    """Batches of views on this process, and the sampler that says of which epoch."""
    sampler_type = RepeatedAugmentationSampler if args.repeated_aug else EpochBatchSampler
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    sampler = sampler_type(len(views), args.batch_size, args.seed, rank, world_size)
    return make_loader(views, batch_sampler=sampler, num_workers=num_workers, device=device), sampler


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """Mixup and CutMix with smoothed labels, by the flags; None where both are off."""
    if not mixes_labels(args):
        return None
    return Mixup(
        args.mixup,
        args.cutmix,
        args.cutmix_minmax,
        args.mixup_prob,
        args.mixup_switch_prob,
        args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


class TrainingState:
    """Everything a training needs to go on exactly where it stopped; made from the newest checkpoint if there is one.

    That is the one in ``output_dir``, or else ``--resume``, which may be of the official code.

    Attributes:
        log: Of the run.
        guard: Leaves out steps whose gradients are not finite.
        first_epoch, first_step: Where to go on.
        best_acc1: The best top-1 so far, in percent.

    Args:
        network: Without the wrapper for several processes.
        ema: Its moving average, if there is one.
        images: Checksum of the training images.
        must_match: Flags which a checkpoint to go on from has to have been written with.
        weights_flag: The flag for weights to start from, named when ``--resume`` holds no more than that.

    Raises:
        ValueError: If ``--resume`` is no file of a training.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        output_dir: Path,
        network: nn.Module,
        ema: NetworkEMA | None,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        images: int,
        steps_per_epoch: int,
        must_match: tuple[str, ...],
        weights_flag: str,
    ):
        self.args, self.network, self.ema, self.optimizer, self.precision = args, network, ema, optimizer, precision
        self.images, self.steps_per_epoch = images, steps_per_epoch
        self.world_size = distributed.get_world_size()
        self.batch_size = args.batch_size * self.world_size
        self.first_epoch, self.first_step, self.best_acc1 = args.start_epoch, 0, 0.0
        checkpoint = load_latest(output_dir / "checkpoint.pth") or self._load(args.resume, weights_flag)
        resumed_log = "log" in checkpoint
        total_steps = args.epochs * steps_per_epoch
        self.log = RunLog(output_dir, total_steps, args.log_freq, args.tensorboard, resumed=resumed_log)
        if checkpoint:
            check_flags(checkpoint, args, must_match)
            self._restore(checkpoint)
        self.guard = FiniteGuard(
            {"network": network},
            output_dir,
            args.max_skipped_steps,
            precision.device,
            in_a_row=checkpoint.get("skipped_steps", 0),
        )

    @staticmethod
    def _load(resume: str, weights_flag: str) -> dict:
        """The checkpoint that ``--resume`` names; empty without it."""
        if not resume:
            return {}
        checkpoint = load_latest(resume)
        if checkpoint is None:
            raise ValueError(f"--resume {resume}: there is no such file")
        if "optimizer" not in checkpoint:
            raise ValueError(f"--resume {resume} holds weights, no training state: give it as {weights_flag}")
        checkpoint.pop("log", None)  # its lines are in another folder
        return checkpoint

    def _restore(self, checkpoint: dict) -> None:
        restore(checkpoint, model=self.network, optimizer=self.optimizer)
        if self.ema is not None:
            restore(checkpoint, model_ema=self.ema.network)
        if checkpoint.get("scaler"):
            self.precision.scaler.load_state_dict(checkpoint["scaler"])
        if "log" in checkpoint:
            self.log.load_state_dict(checkpoint["log"])
        if "step_in_epoch" not in checkpoint:  # the official code writes the number of the epoch that is finished
            checkpoint["epoch"] += 1
        self.first_epoch, self.first_step = resume_position(
            checkpoint, self.batch_size, self.images, self.args.on_changed_run
        )
        self.best_acc1 = checkpoint.get("best_acc1", 0.0)
        distributed.print_once(f"resuming at epoch {self.first_epoch}, step {self.first_step}")

    def __call__(self, epoch: int, step_in_epoch: int) -> dict:
        """What a checkpoint at this step holds; the first keys are those of the official ones."""
        return {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": epoch,
            "model_ema": None if self.ema is None else self.ema.network.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "args": vars(self.args),
            "step_in_epoch": step_in_epoch,
            "best_acc1": self.best_acc1,
            "skipped_steps": int(self.guard.in_a_row),
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "images": self.images,
            "log": self.log.state_dict(),
        }

    def test(self, epoch: int, evaluate: Callable[..., dict[str, float]], checkpointer: Checkpointer) -> dict:
        """Accuracy after an epoch, of the moving average as well with ``--eval-ema``; also written to the log.

        Returns:
            ``test_loss``, ``test_acc1`` and ``test_acc5``, and ``ema_acc1``.
        """
        stop = partial(checkpointer.stop_if_asked, epoch, self.steps_per_epoch)
        result = evaluate(self.network, between_batches=stop)
        tested = {f"test_{name}": value for name, value in result.items()}
        if self.args.eval_ema and self.ema is not None:
            average = self.ema.network
            home = next(average.parameters()).device  # the host with --model-ema-force-cpu
            try:
                tested["ema_acc1"] = evaluate(average.to(self.precision.device), between_batches=stop)["acc1"]
            finally:
                average.to(home)
        self.log.evaluation((epoch + 1) * self.steps_per_epoch, epoch + 1, **tested)
        return tested
