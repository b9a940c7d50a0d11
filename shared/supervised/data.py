"""Labelled images in an order, and with draws, that depend on nothing but seeds."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shared.images.loading import BadImages, EpochBatchSampler
from shared.images.sources import ImageSource
from shared.run.randomness import derive_seed

from .transforms import seed_transforms

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
