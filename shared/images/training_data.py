"""The training images of a method, as batches of views."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from shared import distributed
from shared.multicrop import MultiCropDataset
from shared.run.memory import batch_flags

from .cache import cache_images
from .loading import BadImages, EpochBatchSampler, default_num_workers, make_loader, short_side
from .sources import ImageSource, ask_about_classes, open_source, reading
from .views import ViewRecipe


@dataclass
class TrainingData:
    """The training images, and how they become batches of views on this process.

    Attributes:
        checksum: Of the images, the same on every process.
        batch_size: Images per step, on all processes.
        num_workers: Loader processes of this process.
    """

    dataset: Dataset
    sampler: EpochBatchSampler
    loader: DataLoader
    bad_images: BadImages
    checksum: int
    batch_size: int
    num_workers: int

    @property
    def steps_per_epoch(self) -> int:
        return len(self.sampler)


def open_images(
    args: argparse.Namespace,
    output_dir: Path,
    least_px: int,
    size_flag: str,
    flag: str = "--data_path",
    source: ImageSource | None = None,
) -> tuple[ImageSource, int, BadImages]:
    """The images of ``--data_path``, their checksum, and what happens to those that cannot be read.

    Args:
        args: Flags of :func:`shared.run.flags.add_data_flags`.
        output_dir: Unreadable images are listed in it.
        least_px: Smaller images are enlarged, which is said with the name of ``size_flag``.
        flag: Of the images, in messages.
        source: Instead of what ``--data_path`` alone names.
    """
    source = source or open_source(args.data_path, "train", flag=flag, **reading(args))
    ask_about_classes(source.classes, learns_them=False)
    source = cache_images(source, args.cache)
    checksum = source.checksum()
    distributed.check_same_on_all_processes((len(source), checksum), "the training data (number of images, checksum)")
    bad_images = BadImages(len(source), output_dir / "bad_images.txt", args.on_bad_image, args.max_bad_fraction)
    if args.data_path is not None and (side := short_side(source)) < least_px:
        distributed.print_once(f"images of {side} pixels are smaller than {size_flag} {least_px}: views are enlarged")
    return source, checksum, bad_images


def write_recipes(output_dir: Path, recipes: Sequence[ViewRecipe]) -> None:
    """Leave ``views.json``, by which a page about the run draws its views, also while it trains."""
    if distributed.is_main_process():
        (output_dir / "views.json").write_text(json.dumps([asdict(recipe) for recipe in recipes]))


def open_training_data(
    args: argparse.Namespace,
    recipes: Sequence[ViewRecipe],
    batch_size: int,
    output_dir: Path,
    device: torch.device,
    size_flag: str,
) -> TrainingData:
    """Open ``--data_path`` and make a loader of several views of each image.

    Args:
        args: Flags of :func:`shared.run.flags.add_data_flags`, ``num_workers``, ``augmentation`` and ``seed``.
        recipes: Of the views.
        batch_size: Images per step on this process.
        output_dir: Unreadable images are listed in it.
        size_flag: The flag that says how large the largest views are.
    """
    largest_px = max(recipe.size_px for recipe in recipes)
    source, checksum, bad_images = open_images(args, output_dir, largest_px, size_flag)
    write_recipes(output_dir, recipes)
    dataset = MultiCropDataset(source, recipes, args.seed, args.augmentation, args.in_chans, bad_images)
    world_size = distributed.get_world_size()
    sampler = EpochBatchSampler(
        len(source), batch_size, args.seed, distributed.get_rank(), world_size, flag=batch_flags(args)
    )
    num_workers = default_num_workers() if args.num_workers is None else args.num_workers
    loader = make_loader(dataset, batch_sampler=sampler, num_workers=num_workers, device=device)
    distributed.print_once(f"{source.describe()}: {len(sampler)} steps per epoch")
    return TrainingData(dataset, sampler, loader, bad_images, checksum, batch_size * world_size, num_workers)
