"""What the training programs set up in the same way: processes, images, supports, encoder, resuming."""

import argparse
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from shared import distributed
from shared.images.cache import cache_images
from shared.images.loading import BadImages, EpochBatchSampler, default_num_workers, make_loader, short_side
from shared.multicrop import MultiCropDataset
from shared.networks.batchnorm import synchronize_batchnorm
from shared.optimisation.precision import Precision
from shared.run import randomness
from shared.run.checkpoint import Checkpointer, CheckpointError, check_flags, load_latest, restore, resume_position
from shared.run.log import RunLog
from shared.run.not_finite import FiniteGuard

from .augmentations import Recipe, paws_views, support_views
from .evaluation import SNNMonitor, open_validation
from .heads import Encoder
from .labels import PartlyLabelled, open_partly_labelled
from .losses import support_labels
from .networks import build_encoder
from .optimisation import LARS, lr_schedule, parameter_groups
from .pretrained import load_backbone_into
from .support_sampler import SupportSampler

NETWORK_FLAGS = ("model_name", "in_chans", "output_dim", "use_pred_head")
MOST_SUPPORTS = 16  # of a class, where --supervised_imgs_per_class does not say
SUPPORT_VIEWS = 1  # number of the stream of random numbers of the supports' views


def open_images(args: argparse.Namespace) -> PartlyLabelled:
    """The images and labels that the flags name, with the images cached if ``--cache`` says so."""
    images = open_partly_labelled(
        args.data_path,
        labels=args.labels,
        labels_per_class=args.labels_per_class,
        unlabeled_frac=args.unlabeled_frac,
        subset_path=args.subset_path,
        data_seed=args.data_seed,
        allow_absolute_paths=args.allow_absolute_paths,
        min_confidence=args.min_confidence,
    )
    distributed.print_once(images.describe())
    images.source = cache_images(images.source, getattr(args, "cache", "none"))
    return images


def latest(args: argparse.Namespace) -> str:
    """Name of the checkpoint that a run goes on from."""
    return f"{args.write_tag}-latest.pth.tar"


def numbered_checkpoint(args: argparse.Namespace, epoch: int) -> str | None:
    """Name under which the checkpoint of this epoch (from 0) stays; None for most epochs."""
    done = epoch + 1
    due = args.checkpoint_freq > 0 and done % args.checkpoint_freq == 0
    return f"{args.write_tag}-ep{done}.pth.tar" if due else None


# --- Batches ----------------------------------------------------------------------------------------------------------


@dataclass
class TrainingData:
    """Unlabelled and labelled batches of this process.

    Attributes:
        checksum: Of images and labels, the same on every process.
        unlabelled: Batches (views, labels, indices) of all images, labelled ones too; their labels are not looked at.
        supports: Batches of labelled images, as many as of ``unlabelled``.
        batch_size: Unlabelled images per step, on all processes.
    """

    images: PartlyLabelled
    dataset: MultiCropDataset
    unlabelled: DataLoader
    supports: DataLoader
    sampler: EpochBatchSampler
    support_sampler: SupportSampler
    bad_images: BadImages
    checksum: int
    batch_size: int
    num_workers: int

    @property
    def steps_per_epoch(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int, start_step: int) -> None:
        self.sampler.set_epoch(epoch, start_step)
        self.support_sampler.set_epoch(epoch, start_step)

    def __iter__(self) -> Iterator:
        return zip(self.unlabelled, self.supports, strict=True)


def open_training_data(
    args: argparse.Namespace, recipe: Recipe, output_dir: Path, device: torch.device
) -> TrainingData:
    """Open the images and labels, and make the loaders of both kinds of batches."""
    images = open_images(args)
    source = images.source
    checksum = zlib.crc32(images.labels, source.checksum())
    distributed.check_same_on_all_processes((len(source), checksum), "the training data (number of images, checksum)")
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    num_workers = default_num_workers() if args.num_workers is None else args.num_workers

    multicrop = getattr(args, "multicrop", 0)
    views = paws_views(recipe, multicrop, args.color_jitter_strength)
    bad_images = BadImages(len(source), output_dir / "bad_images.txt", args.on_bad_image, args.max_bad_fraction)
    dataset = MultiCropDataset(source, views, args.seed, args.augmentation, args.in_chans, bad_images)
    sampler = EpochBatchSampler(len(source), args.unsupervised_batch_size, args.seed, rank, world_size)

    choose_supports(args, images, world_size)
    support_sampler = SupportSampler(
        images.labels,
        args.supervised_imgs_per_class,
        args.classes_per_batch,
        len(sampler),
        args.seed,
        rank,
        world_size,
        args.unique_classes_per_rank,
        class_names=images.classes,
    )
    support_set = MultiCropDataset(
        source,
        support_views(recipe, multicrop, args.color_jitter_strength, args.supervised_views),
        randomness.derive_seed(args.seed, SUPPORT_VIEWS),
        args.augmentation,
        args.in_chans,
        BadImages(len(source), on_bad_image="error"),  # a replacement could be of another class
    )
    distributed.print_once(
        f"{len(sampler)} steps per epoch, each of {args.unsupervised_batch_size} images and "
        f"{args.classes_per_batch} x {args.supervised_imgs_per_class} supports on each of {world_size} process(es)"
    )
    if args.data_path is not None and (side := short_side(source)) < recipe.large[0]:
        distributed.print_once(
            f"images of {side} pixels are smaller than views of {recipe.large[0]}: they are enlarged"
        )
    return TrainingData(
        images,
        dataset,
        make_loader(dataset, batch_sampler=sampler, num_workers=num_workers, device=device),
        make_loader(support_set, batch_sampler=support_sampler, num_workers=num_workers, device=device),
        sampler,
        support_sampler,
        bad_images,
        checksum,
        args.unsupervised_batch_size * world_size,
        num_workers,
    )


def choose_supports(args: argparse.Namespace, images: PartlyLabelled, world_size: int) -> None:
    """Fill in ``--classes_per_batch`` and ``--supervised_imgs_per_class`` where they were not given."""
    if args.classes_per_batch is None:
        args.classes_per_batch = len(images.classes) // (world_size if args.unique_classes_per_rank else 1)
    if args.supervised_imgs_per_class is None:
        fewest = int(np.bincount(images.labels[images.labelled]).min())
        share = 1 if args.unique_classes_per_rank or fewest < world_size else world_size
        args.supervised_imgs_per_class = min(MOST_SUPPORTS, fewest // share)


# --- Encoder and evaluation -------------------------------------------------------------------------------------------


def build_wrapped_encoder(args: argparse.Namespace, recipe: Recipe, device: torch.device) -> nn.Module:
    """The encoder on this process's device and joined with those of the other processes."""
    encoder = build_encoder(args.model_name, args.output_dim, args.use_pred_head, recipe.large[0], args.in_chans)
    if args.pretrained is not None:
        load_backbone_into(encoder, args.model_name, args.pretrained, args.allow_partial)
    encoder = synchronize_batchnorm(encoder, device).to(device)
    return distributed.wrap(encoder, device)


def build_monitor(
    args: argparse.Namespace, data: TrainingData, recipe: Recipe, output_dir: Path, device: torch.device
) -> SNNMonitor:
    """The evaluation between epochs; says why when there is none."""
    validation = "--eval_knn_freq 0"
    if args.eval_knn_freq != 0:
        validation = open_validation(data.images, args.data_path, args.val_path, args.allow_absolute_paths)
    bad_images = None
    if not isinstance(validation, str):
        listed = output_dir / "bad_images_val.txt"
        bad_images = BadImages(len(validation.source), listed, args.on_bad_image, args.max_bad_fraction)
    monitor = SNNMonitor(
        data.images,
        validation,
        recipe,
        args.temperature,
        args.eval_knn_freq,
        args.epochs,
        device,
        data.num_workers,
        bad_images,
    )
    what = (
        f"no evaluation between epochs: {monitor.disabled_reason}"
        if monitor.disabled_reason
        else f"evaluation: {validation.describe()}"
    )
    distributed.print_once(what)
    return monitor


# --- Optimisation -----------------------------------------------------------------------------------------------------


def build_optimizer(args: argparse.Namespace, encoder: nn.Module, steps_per_epoch: int) -> tuple[LARS, np.ndarray]:
    """LARS, and the learning rate of every step."""
    optimizer = LARS(parameter_groups(encoder, args.weight_decay), momentum=args.momentum, nesterov=args.nesterov)
    warmup_steps, steps = args.warmup * steps_per_epoch, args.epochs * steps_per_epoch
    return optimizer, lr_schedule(args.start_lr, args.lr, args.final_lr, warmup_steps, steps)


def labels_of_supports(args: argparse.Namespace, device: torch.device) -> Tensor:
    """Smoothed labels of the supports of a step; see :func:`paws.losses.support_labels`."""
    return support_labels(
        args.supervised_imgs_per_class,
        args.classes_per_batch,
        distributed.get_world_size(),
        args.unique_classes_per_rank,
        args.label_smoothing,
        args.supervised_views,
    ).to(device)


# --- Resuming ---------------------------------------------------------------------------------------------------------


def find_checkpoint(args: argparse.Namespace, output_dir: Path) -> dict | None:
    """The run's newest checkpoint; while it has none, that of ``--read_checkpoint``."""
    checkpoint = load_latest(output_dir / latest(args))
    if checkpoint is None and args.read_checkpoint is not None:
        checkpoint = load_latest(output_dir / args.read_checkpoint)
        if checkpoint is None:
            raise CheckpointError(f"--read_checkpoint {args.read_checkpoint}: there is no such file in {output_dir}")
    return checkpoint


@dataclass
class Resumable:
    """The parts of a training that every checkpoint holds.

    The position in the supports needs no state of its own: what a step gets is a function of its number.

    Attributes:
        guard: Set once the encoder is loaded, for it remembers the running statistics.
    """

    args: argparse.Namespace
    data: TrainingData
    encoder: nn.Module
    optimizer: LARS
    precision: Precision
    log: RunLog
    guard: FiniteGuard | None = field(default=None)

    def evaluate(self, evaluation: SNNMonitor, checkpointer: Checkpointer, epoch: int) -> None:
        """Evaluate after ``epoch`` (-1: before training) if that is due; a signal stops it, after saving."""
        if not evaluation.is_due(epoch):
            return
        steps = self.data.steps_per_epoch
        position = (epoch, steps) if epoch >= 0 else (0, 0)
        top1 = evaluation.run(distributed.unwrap(self.encoder), partial(checkpointer.stop_if_asked, *position))
        self.log.evaluation((epoch + 1) * steps, epoch + 1, snn_top1=top1)

    def state(self, epoch: int, step_in_epoch: int) -> dict:
        """Where to go on and with what; the first keys are those of the official checkpoints. For every rank."""
        args = self.args
        encoder: Encoder = distributed.unwrap(self.encoder)
        return {
            "encoder": encoder.state_dict(),
            "opt": self.optimizer.state_dict(),
            "epoch": epoch,
            "unlabel_prob": args.unlabeled_frac,
            "s_batch_size": args.supervised_imgs_per_class,
            "u_batch_size": args.unsupervised_batch_size,
            "world_size": distributed.get_world_size(),
            "lr": args.lr,
            "temperature": args.temperature,
            "amp": self.precision.scaler.state_dict(),
            "args": vars(args),
            "step_in_epoch": step_in_epoch,
            "skipped_steps": int(self.guard.in_a_row),
            "batch_size": self.data.batch_size,
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
        # all but the learning rate, which every step sets: at the end of an epoch there may be no step before the save
        own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.optimizer.param_groups]
        restore(checkpoint, encoder=distributed.unwrap(self.encoder), opt=self.optimizer)
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)  # what the flags say now
        if checkpoint.get("amp"):
            self.precision.scaler.load_state_dict(checkpoint["amp"])
        if "log" in checkpoint:
            self.log.load_state_dict(checkpoint["log"])
        position = resume_position(checkpoint, self.data.batch_size, self.data.checksum, self.args.on_changed_run)
        distributed.print_once("resuming at epoch {}, step {}".format(*position))
        return position
