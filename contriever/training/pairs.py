"""Pairs of views for pre-training, drawn from one or several data sets of tokenised text (sections 4.1 and 5.1)."""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from shared import distributed

from ..augmentations import Draws, Recipe, SpecialTokens, two_views
from ..encoder import pad
from ..text.tokens import ChunkedText, files_of_rank, open_shard, token_files

OFFSET, ITEM = 0, 1  # kinds of draws, each with seeds of its own


def open_datasets(
    folders: list[str], loading_mode: str, chunk_length: int, within_documents: bool
) -> dict[str, ChunkedText]:
    """The data sets of this process by folder."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    datasets = {}
    for folder in folders:
        files = token_files(folder)
        mine = files_of_rank(files, loading_mode, rank, world_size)
        if not mine:
            raise ValueError(
                f"--loading_mode split: the {len(files)} shards of {folder} are fewer than the {world_size} processes; "
                "preprocess with a smaller --shard_mb, or use --loading_mode full"
            )
        if str(folder) in datasets:
            raise ValueError(f"--train_data names {folder} twice")
        datasets[str(folder)] = ChunkedText([open_shard(file) for file in mine], chunk_length, within_documents)
    return datasets


def fingerprint(folders: list[str]) -> str:
    """Names, sizes and checksums of the ends of all files of tokens, to notice that a run goes on with other text."""
    files = [file for folder in folders for file in token_files(folder)]
    return " ".join(f"{file.parent.name}/{file.name}:{file.stat().st_size}:{_checksum_of_ends(file)}" for file in files)


def _checksum_of_ends(file: Path) -> str:
    """CRC-32 of the first and last 64 KiB: the whole of a shard may take minutes to read."""
    with open(file, "rb") as stream:
        checksum = zlib.crc32(stream.read(1 << 16))
        stream.seek(max(0, file.stat().st_size - (1 << 16)))
        return f"{zlib.crc32(stream.read(), checksum):08x}"


def sampling_probabilities(sizes: list[int], coefficient: float) -> np.ndarray:
    """Probability of each data set: its share of all chunks to the power of ``coefficient``, normalised.

    0: all alike; 1: proportional to their sizes.
    """
    weights = (np.array(sizes) / sum(sizes)) ** coefficient
    return weights / weights.sum()


class PretrainingPairs(Dataset):
    """Batches of pairs of views.

    Each pair comes from a data set drawn with :func:`sampling_probabilities` and from a uniformly drawn chunk of it.
    All draws are functions of the seed, the epoch and the number of the pair.

    Args:
        datasets: By name.
        stream: Distinguishes processes whose offsets must differ (the rank with ``--loading_mode split``).
    """

    def __init__(
        self,
        datasets: dict[str, ChunkedText],
        recipe: Recipe,
        special: SpecialTokens,
        sampling_coefficient: float,
        pad_id: int,
        seed: int,
        stream: int = 0,
    ):
        self.names, self.datasets = list(datasets), list(datasets.values())
        self.recipe, self.special, self.pad_id = recipe, special, pad_id
        self.seed, self.stream = seed, stream
        self.probabilities = sampling_probabilities([len(d) for d in self.datasets], sampling_coefficient)

    def __len__(self) -> int:
        """Chunks of all data sets: what the reference calls an epoch is as many pairs, drawn with replacement."""
        return sum(len(d) for d in self.datasets)

    def offset(self, dataset: int, epoch: int) -> int:
        """Where the first chunk of a data set begins in an epoch."""
        return self.datasets[dataset].draw_offset(Draws.seeded(self.seed, OFFSET, self.stream, epoch, dataset).py)

    def draw_pair(self, offsets: list[int], draws: Draws) -> tuple[int, np.ndarray, np.ndarray]:
        """Number of the data set, query and key."""
        which = int(draws.np.choice(len(self.datasets), p=self.probabilities))
        dataset, offset = self.datasets[which], offsets[which]
        chunk = dataset.chunk(draws.py.randint(0, dataset.num_chunks(offset) - 1), offset)
        return (which, *two_views(chunk, self.recipe, draws, self.special))

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        """The batch of pairs with these (epoch, number): ``q_tokens``, ``q_mask``, ``k_tokens``, ``k_mask`` (B, N)."""
        epoch = keys[0][0]
        offsets = [self.offset(i, epoch) for i in range(len(self.datasets))]
        pairs = [self.draw_pair(offsets, Draws.seeded(self.seed, ITEM, *key)) for key in keys]
        _, queries, keys = zip(*pairs, strict=True)
        return collate(queries, keys, self.pad_id)


def collate(queries: Sequence[Sequence[int]], keys: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Token ids and masks of queries (``q_*``) and keys (``k_*``), each padded to their longest."""
    q_tokens, q_mask = pad(queries, pad_id)
    k_tokens, k_mask = pad(keys, pad_id)
    return {"q_tokens": q_tokens, "q_mask": q_mask, "k_tokens": k_tokens, "k_mask": k_mask}


class StepSampler:
    """Numbers of the pairs of each batch, resumable at any step.

    Two processes together draw what one draws with twice the batch.

    Args:
        steps_per_epoch: Batches after which chunks get new offsets.
        total_steps: Of the whole run.
    """

    def __init__(self, batch_size: int, steps_per_epoch: int, total_steps: int, rank: int, world_size: int):
        self.batch_size, self.steps_per_epoch, self.total_steps = batch_size, steps_per_epoch, total_steps
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start_step = 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        """Steps of the epoch that was set; the last one may be shorter."""
        return min(self.steps_per_epoch, self.total_steps - self.epoch * self.steps_per_epoch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start_step, len(self)):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, number) for number in range(first, first + self.batch_size)]


def steps_per_epoch(pairs: PretrainingPairs, batch_size: int, loading_mode: str) -> int:
    """Batches of one epoch, the same on every process."""
    per_step = batch_size * (1 if loading_mode == "split" else distributed.get_world_size())
    steps = -distributed.max_over_processes(-(len(pairs) // per_step))
    if steps < 1:
        raise ValueError(f"{len(pairs)} chunks of text do not fill one batch of --per_gpu_batch_size {batch_size}")
    return steps
