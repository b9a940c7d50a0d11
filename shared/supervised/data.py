"""Labelled images in an order, and with draws, that depend on nothing but seeds."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import Dataset

from shared import distributed
from shared.images.cache import cache_images
from shared.images.channels import are_asked_for
from shared.images.inaturalist import open_inaturalist
from shared.images.labelled import match_classifier, open_labelled
from shared.images.loading import BadImages, EpochBatchSampler, EvalDataset, default_num_workers, make_loader
from shared.images.sources import ImageSource, ask_about_classes, check_same_classes, open_source, reading
from shared.images.training_data import TrainingData
from shared.optimisation.precision import Precision
from shared.run.randomness import derive_seed

from .evaluation import evaluate_classifier
from .flags import INAT_YEARS, mixes_labels
from .transforms import eval_transform, seed_transforms

ROUND_TO = 256  # images of an epoch of repeated augmentation, before they are shared out


class RepeatedAugmentationSampler(EpochBatchSampler):
    """Repeated augmentation (Hoffer et al. 2020; Berman et al. 2019): several views of an image in the same step.

    Every image of the shuffled list appears three times in a row, and rank r takes every W-th entry from r on, so the
    views of an image land on neighbouring ranks. An epoch has the length of one without repetitions: of N images it
    shows N/3, three times, rounded down to a multiple of 256 views (which data sets of fewer images are not).

    Yields batches of keys (epoch, index, repetition). Args as for :class:`shared.images.loading.EpochBatchSampler`.
    """

    repeats = 3

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return self.num_selected() // self.batch_size

    def num_selected(self) -> int:
        """Views of an epoch on one rank."""
        return (self.num_samples // ROUND_TO * ROUND_TO or self.num_samples) // self.world_size

    def selected(self) -> list[tuple[int, int]]:
        """(index, repetition) of this rank's views, in order."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator).numpy()
        per_rank = -(-self.num_samples * self.repeats // self.world_size)
        # entry number i of the padded list is repetition i % 3 of an image
        entries = np.arange(self.rank, per_rank * self.world_size, self.world_size)[: self.num_selected()]
        entries %= self.num_samples * self.repeats
        return list(zip(order[entries // self.repeats].tolist(), (entries % self.repeats).tolist(), strict=True))

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        mine = self.selected()
        for step in range(self.start_step, len(self)):
            batch = mine[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, index, repetition) for index, repetition in batch]


class LabelledViews(Dataset):
    """(view, label, index) for keys (epoch, index) or (epoch, index, repetition).

    Every draw is a function of the seed and the key. The index is that of the replacement for an unreadable image.

    Args:
        transform: Maps RGB pixels (H, W, 3), uint8, to a tensor; may draw from the global generators of python, numpy
            and torch, which are seeded before it.
        bad_images: Policy for images that cannot be read; by default they are replaced.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[np.ndarray], Tensor],
        seed: int = 0,
        bad_images: BadImages | None = None,
    ):
        self.source, self.transform, self.seed = source, transform, seed
        self.bad_images = bad_images or BadImages(len(source))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Sequence[int]) -> tuple[Tensor, int, int]:
        epoch, index, *repetition = key
        key = (self.seed, epoch, index, *repetition)
        pixels, index = self.bad_images.read(self.source, index, key, self._read)
        seed_transforms(derive_seed(*key))
        return self.transform(pixels), self.source.label(index), index

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        return self.source.load(index).decode(), index


def open_train_and_val(args: argparse.Namespace) -> tuple[ImageSource, ImageSource]:
    """The labelled images that ``--data-set``, ``--data_path`` and ``--val_path`` name.

    With ``--eval`` and ``--val_path`` both are the images to evaluate on: those of the training are not needed, but for
    ``--shared_classes_only`` with files of weights that do not name their classes.

    Raises:
        ValueError: If there are none, they have no classes, or the classes of both parts differ.
    """
    if are_asked_for(args) and (args.data_set.startswith("CIFAR") or args.data_set in INAT_YEARS):
        raise ValueError(
            f"--data-set {args.data_set} is RGB, which --in_chans {args.in_chans} or --value_range are not for"
        )
    if args.data_path is None and args.data_set != "IMNET" and not (args.eval and args.val_path):
        raise ValueError(f"--data-set {args.data_set} needs --data_path")
    if args.eval and args.val_path is not None and (args.classes or not args.shared_classes_only):
        val = open_source(args.val_path, "all", flag="--val_path", **reading(args))
        check_same_classes(val, val)  # that there are any
        return val, val
    if args.data_set.startswith("CIFAR") or args.data_set in INAT_YEARS:
        if args.val_path is not None:
            raise ValueError(f"--val_path {args.val_path}: --data-set {args.data_set} has a val part of its own")
        if args.shared_classes_only and not args.eval:
            raise ValueError(f"--shared_classes_only is not for --data-set {args.data_set}")
    if args.data_path is not None and args.data_set.startswith("CIFAR"):
        name = args.data_set.lower()
        root = None if args.data_path.lower() == name else args.data_path
        return open_source(name, "train", download_root=root), open_source(name, "val", download_root=root)
    if args.data_path is not None and args.data_set in INAT_YEARS:
        return open_inaturalist(args.data_path, INAT_YEARS[args.data_set], args.inat_category)
    return open_labelled(args.data_path, args.val_path, shared_classes_only=args.shared_classes_only, **reading(args))


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

    def print_accuracy(self, network: nn.Module) -> None:
        """Evaluate a network on its device, and print the result on rank 0."""
        result = self.evaluate(network)
        accuracies = f"top-1 {result['acc1']:.2f} %, top-5 {result['acc5']:.2f} %"
        distributed.print_once(f"{self.val.describe()}: {accuracies}")


def open_images(
    args: argparse.Namespace,
    output_dir: Path,
    precision: Precision,
    mean: Sequence[float],
    std: Sequence[float],
    crop_ratio: float,
    interpolation: str = "bicubic",
) -> LabelledImages:
    """Open what ``--data-set``, ``--data_path`` and ``--val_path`` name.

    Args:
        args: Flags of :mod:`shared.supervised.flags` and :func:`shared.run.flags.add_data_flags`, and ``input_size``.
        output_dir: Unreadable images are listed in it, but with ``--eval``.
        mean, std: Of the images, per channel.
        crop_ratio: Side of the centre crop that is evaluated, over the short side of the image.
        interpolation: Of its resizing.
    """
    train, val = open_train_and_val(args)
    if args.eval and args.classes:
        train = val = match_classifier(val, args.classes, args.shared_classes_only)
    if not args.eval:
        ask_about_classes(train.classes)
    train = cache_images(train, args.cache)
    checksum = train.checksum()
    distributed.check_same_on_all_processes((len(train), checksum), "the training data (number of images, checksum)")
    bad_images, bad_val_images = (
        BadImages(len(source), None if args.eval else output_dir / listed, args.on_bad_image, args.max_bad_fraction)
        for source, listed in ((train, "bad_images.txt"), (val, "bad_images_val.txt"))
    )
    num_workers = default_num_workers() if args.num_workers is None else args.num_workers
    transform = eval_transform(args.input_size, mean, std, crop_ratio, args.in_chans, interpolation)
    evaluate = partial(
        evaluate_classifier,
        dataset=EvalDataset(val, transform, bad_val_images),
        precision=precision,
        batch_size=int(1.5 * args.batch_size),
        num_workers=num_workers,
        absent=np.setdiff1d(range(len(val.classes)), val.labels).tolist() if args.shared_classes_only else (),
    )
    return LabelledImages(train, val, checksum, bad_images, num_workers, evaluate)


def train_batches(
    args: argparse.Namespace, images: LabelledImages, transform: Callable[[np.ndarray], Tensor], device: torch.device
) -> TrainingData:
    """Views of the training images, by ``--seed``, ``--batch-size`` and ``--repeated-aug``."""
    views = LabelledViews(images.train, transform, args.seed, images.bad_images)
    sampler_type = RepeatedAugmentationSampler if args.repeated_aug else EpochBatchSampler
    world_size = distributed.get_world_size()
    sampler = sampler_type(len(views), args.batch_size, args.seed, distributed.get_rank(), world_size)
    loader = make_loader(views, batch_sampler=sampler, num_workers=images.num_workers, device=device)
    batch_size = args.batch_size * world_size
    return TrainingData(views, sampler, loader, images.bad_images, images.checksum, batch_size, images.num_workers)


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
