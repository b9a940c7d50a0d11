"""The training images, and from clusters to batches: pseudo-labels, images drawn uniformly over them (section 3.3)."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from shared import distributed
from shared.evaluation.features import RankSampler
from shared.images.cluster_draws import count_repetitions, draw_uniformly
from shared.images.loading import EvalDataset, make_loader
from shared.images.training_data import TrainingData, open_images
from shared.multicrop import MultiCropDataset
from shared.run.randomness import derive_seed
from shared.run.settings import more_than_data, tell_settings

from .augmentations import centre_crop, random_crop
from .clustering import check_clustering

SAMPLERS = ("uniform", "official")


def pseudo_labels(assignments: Tensor, num_clusters: int) -> Tensor:
    """Label of each image, (N,): the rank of its cluster among those that are not empty."""
    filled = assignments.bincount(minlength=num_clusters) > 0
    return (filled.cumsum(0) - 1)[assignments]


def draw_epoch(clusters: list[np.ndarray], num_draws: int, seed: int, sampler: str) -> np.ndarray:
    """Images of one epoch, in order, (``num_draws``,).

    Args:
        clusters: Images of each cluster.
        seed: Fixes the draw.
        sampler: ``uniform``: uniform over the clusters, as the paper says. ``official``: what the released code does:
            it takes the drawn image numbers for positions in the list of images sorted by cluster, which makes the
            draw uniform over images more than over clusters.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"--sampler {sampler!r} is none of {', '.join(SAMPLERS)}")
    drawn = draw_uniformly(clusters, num_draws, np.random.RandomState(seed % 2**32))
    return drawn if sampler == "uniform" else np.concatenate(clusters)[drawn]


class DrawnBatches:
    """Batches of the images drawn for an epoch, split over the processes, resumable inside the epoch.

    An item is the key of a :class:`shared.multicrop.MultiCropDataset`: (a number made of the epoch and of how often the
    image has been drawn before, the image), so that an image drawn twice is seen in two views.

    Args:
        num_draws: Images per epoch.
        batch_size: Images per step of all processes together.

    Raises:
        ValueError: If the batch cannot be shared out or an epoch has no step.
    """

    def __init__(self, num_draws: int, batch_size: int):
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.num_draws, self.batch_size = num_draws, batch_size
        self.epoch = self.start_step = 0
        self.images = np.empty(0, dtype=np.int64)
        if batch_size < 1 or batch_size % self.world_size:
            raise ValueError(f"--batch {batch_size} cannot be shared out evenly over {self.world_size} process(es)")
        if len(self) < 1:
            raise ValueError(
                f"{num_draws} images per epoch (--reassign) are not enough for {self.world_size} processes"
            )

    def __len__(self) -> int:
        """Steps of an epoch; the last batch is smaller, and left out if it does not have an image for every process."""
        steps, rest = divmod(self.num_draws, self.batch_size)
        return steps + (rest >= self.world_size)

    def set_epoch(self, epoch: int, images: np.ndarray, start_step: int = 0) -> None:
        """Choose the epoch, its images, and how many of its batches were done already; those are not loaded."""
        self.epoch, self.images, self.start_step = epoch, images, start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        repetitions = count_repetitions(self.images)
        for step in range(self.start_step, len(self)):
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            images, times = self.images[batch], repetitions[batch]
            shared_out = len(images) // self.world_size * self.world_size
            mine = slice(self.rank, shared_out, self.world_size)
            yield [
                (derive_seed(self.epoch, time), image)
                for image, time in zip(images[mine].tolist(), times[mine].tolist(), strict=True)
            ]


def open_training_data(
    args: argparse.Namespace, output_dir: Path, device: torch.device
) -> tuple[TrainingData, DataLoader]:
    """Open ``DIR``: a loader of random crops for training, and one of centre crops for clustering.

    Returns:
        The training data, whose sampler wants to know what an epoch draws; and the loader of this process's share of
        the images, in order.

    Raises:
        ValueError: If there are fewer images than clusters.
    """
    source, checksum, bad_images = open_images(args, output_dir, args.crop_size, "--crop_size", flag="DIR")
    tell_settings(
        args,
        more_than_data("--batch", args.batch, len(source), take=max(1, len(source) // 4)),
        more_than_data("--nmb_cluster", args.nmb_cluster, len(source)) if args.small_data else None,  # else an error
    )
    check_clustering(len(source), args.clustering, args.nmb_cluster, args.kmeans)
    workers = {"num_workers": args.num_workers, "device": device}
    recipes, in_chans = [random_crop(args.crop_size, args.crop_scale)], args.in_chans
    views = MultiCropDataset(source, recipes, args.seed, in_chans=in_chans, bad_images=bad_images)
    batches = DrawnBatches(int(args.reassign * len(source)), args.batch)
    train_loader = make_loader(views, batch_sampler=batches, **workers)
    centres = EvalDataset(source, centre_crop(args.crop_size, False, in_chans), bad_images)
    per_rank = args.batch // distributed.get_world_size()
    feature_loader = make_loader(centres, sampler=RankSampler(len(source)), batch_size=per_rank, **workers)
    distributed.print_once(f"{source.describe()}: {len(batches)} steps per epoch")
    return TrainingData(
        views, batches, train_loader, bad_images, checksum, args.batch, args.num_workers
    ), feature_loader
