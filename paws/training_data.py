"""Batches of the training programs: views of all images, and labelled images beside them."""

import argparse
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from shared import distributed
from shared.images.cache import cache_images
from shared.images.loading import BadImages, EpochBatchSampler, default_num_workers, make_loader, short_side
from shared.multicrop import MultiCropDataset
from shared.run import randomness

from .augmentations import Recipe, paws_views, support_views
from .labels import PartlyLabelled, open_partly_labelled
from .losses import support_labels
from .support_sampler import SupportSampler

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


@dataclass
class TrainingData:
    """Unlabelled and labelled batches of this process.

    Attributes:
        checksum: Of images and labels, the same on every process.
        unlabelled: Batches (views, labels, indices) of all images, labelled ones too; their labels are not looked at.
        supports: Batches of labelled images, as many as of ``unlabelled``.
        support_labels: Smoothed labels of the supports of a step, see :func:`paws.losses.support_labels`.
        batch_size: Unlabelled images per step, on all processes.
    """

    images: PartlyLabelled
    dataset: MultiCropDataset
    unlabelled: DataLoader
    supports: DataLoader
    support_labels: Tensor
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
    labels = support_labels(
        args.supervised_imgs_per_class,
        args.classes_per_batch,
        world_size,
        args.unique_classes_per_rank,
        args.label_smoothing,
        args.supervised_views,
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
        labels,
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


@dataclass
class LabelledBatches:
    """Batches (views, labels, indices) of labelled images on this process: what fine-tuning sees.

    Attributes:
        batch_size: Images per step, on all processes.
        checksum: Of all images.
    """

    loader: DataLoader
    sampler: EpochBatchSampler | SupportSampler
    batch_size: int
    checksum: int

    @property
    def steps_per_epoch(self) -> int:
        return len(self.sampler)
