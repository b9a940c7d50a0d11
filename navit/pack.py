"""Packing images of different lengths into sequences, and the loader of packed batches.

Images arrive in an order that depends on the seed alone. Each goes into the first sequence with enough room, else it
opens another one; so many sequences, the first ones, are a batch. Which images lie in the sequences that stay open is
part of the checkpoint: a run that was killed goes on with the same batches, with any number of workers.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from shared import distributed
from shared.images.decode import DecodedImage
from shared.images.loading import BadImages, EvalDataset, make_loader
from shared.images.sources import ImageSource, open_source
from shared.images.subsets import Subset
from shared.run.randomness import derive_seed

from .native_resolution_vit import NaViT, Packed, coordinates_of, patchify
from .sampling import Dropping, Resolutions, fitting_size, nearest_grid

CHUNK = 8  # images that a worker reads at a time
END_OF_TEXT = 256  # after the bytes of a text


class Placement(NamedTuple):
    """Where images lie."""

    sequence: np.ndarray  # of each image, (E,)
    offset: np.ndarray  # in it, (E,)
    slots: np.ndarray  # place of every token, image by image, counted through all sequences, (N,)
    shape: tuple[int, int]  # number of sequences and their length


def first_fit(lengths: Sequence[int], sequence_length: int) -> Placement:
    """Put images of these lengths, in this order, each into the first sequence with enough room (appendix A.3)."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.max() > sequence_length:
        raise ValueError(f"an image of {lengths.max()} tokens is longer than a sequence of {sequence_length}")
    sequence, offset, room = np.zeros_like(lengths), np.zeros_like(lengths), np.full(len(lengths), sequence_length)
    opened = 0
    for i, n in enumerate(lengths):
        s = int(np.argmax(room[: opened + 1] >= n))  # the one after the open ones is empty
        opened = max(opened, s + 1)
        sequence[i], offset[i] = s, sequence_length - room[s]
        room[s] -= n
    within = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    slots = np.repeat(sequence * sequence_length + offset, lengths) + within
    return Placement(sequence, offset, slots, (opened, sequence_length))


# --- Images as patches ------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """An image as the loader's workers give it."""

    number: int  # of the image in the run
    label: int
    patches: np.ndarray  # uint8 or normalised float32, (n, patch * patch * C), those that were not dropped
    coords: np.ndarray  # (n, 2)
    grid: tuple[int, int]  # rows and columns of the whole image
    shrunk: bool  # whether it was made smaller than drawn, to fit into a sequence


def choose_grid(
    size: tuple[int, int], resolution: float, patch: int, kept: Callable[[int], np.ndarray], longest: tuple[int, int]
) -> tuple[tuple[int, int], np.ndarray, bool]:
    """Grid of an image at an effective resolution, its tokens that are kept, and whether it was shrunk.

    Args:
        kept: Maps a number of tokens to those that are kept.
        longest: Tokens that are kept, and patches a side, beyond which an image is shrunk.
    """
    grid, shrunk = nearest_grid(size, resolution, patch), False
    while len(chosen := kept(math.prod(grid))) > longest[0] or max(grid) > longest[1]:
        most = math.prod(grid) * longest[0] // max(longest[0], len(chosen))
        grid, shrunk = tuple(side // patch for side in fitting_size(size, most, patch, most_a_side=longest[1])), True
    return grid, chosen, shrunk


def resized_patches(pixels: np.ndarray, grid: tuple[int, int], patch: int, in_chans: int) -> Tensor:
    """Patches (rows * columns, patch * patch * C) of an image (H, W, C), resized to the grid, antialiased.

    Args:
        pixels: RGB, uint8, of which ``in_chans`` 1 takes the luminance; or normalised float32 of any channels.
    """
    if in_chans == 1 and pixels.shape[2] == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[:, :, None]
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    if image.shape[1:] != (size := tuple(side * patch for side in grid)):
        image = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
    return patchify(image, patch)


def pack(patches: Sequence[Tensor], *where) -> Packed:
    """:meth:`Packed.of`, for pixels of uint8 in [-1, 1]; floats, of images of other channels, are normalised."""
    packed = Packed.of(patches, *where)
    if not packed.patches.is_floating_point():
        packed.patches = packed.patches / 127.5 - 1
    return packed


def pack_texts(texts: Sequence[str], most: int) -> Packed:
    """Texts as their first bytes, at most ``most`` with the end."""
    words = [torch.tensor([*text.replace("_", " ").encode()[: most - 1], END_OF_TEXT]) for text in texts]
    return Packed.of(words, [coordinates_of(1, len(w)) for w in words], [(1, len(w)) for w in words])


class CutMaterials(Subset):
    """The generated images of 32 pixels, each cut to a rectangle of its own: sides of 14 to 32, shapes up to 1 : 2."""

    def __init__(self, split: str):
        source = open_source(None, split)
        name = source.name.replace("materials", "materials of many shapes")
        super().__init__(source, np.arange(len(source)), name)
        rng = np.random.default_rng(len(self))
        longest, turn = rng.integers(20, 33, len(self)), rng.uniform(-1, 1, (1, len(self))) * [[1], [-1]]
        self.shapes = (longest / 2 ** np.maximum(turn, 0)).round().clip(14).astype(int)  # (height, width) of each

    def load(self, index: int) -> DecodedImage:
        rows, columns = (slice((32 - side) // 2, (32 + side) // 2) for side in self.shapes[:, index])
        return DecodedImage(np.ascontiguousarray(super().load(index).decode()[rows, columns]))


@lru_cache(maxsize=2)
def order_of_epoch(seed: int, epoch: int, images: int) -> np.ndarray:
    return np.random.default_rng(derive_seed(seed, epoch)).permutation(images)


@dataclass
class TrainPatches(Dataset):
    """Examples by the numbers of images in the run: number g is image g modulo N of the permutation g // N."""

    source: ImageSource
    patch: int
    resolutions: Resolutions
    dropping: Dropping
    longest: tuple[int, int]  # tokens and patches a side, see choose_grid
    seed: int  # of all draws
    bad_images: BadImages
    in_chans: int = 3
    flip: bool = True  # whether half of the images are mirrored

    def index(self, number: int) -> int:
        epoch, place = divmod(number, len(self.source))
        return int(order_of_epoch(self.seed, epoch, len(self.source))[place])

    def draw(self, number: int, size: tuple[int, int]) -> tuple[tuple[int, int], np.ndarray, bool]:
        """:func:`choose_grid` for an image of this size and number."""
        resolution = self.resolutions.draw(np.random.default_rng(derive_seed(self.seed, number, 0)))

        def kept(length: int) -> np.ndarray:
            return self.dropping.draw(length, number, np.random.default_rng(derive_seed(self.seed, number, 1)))

        return choose_grid(size, resolution, self.patch, kept, self.longest)

    def __getitems__(self, numbers: Sequence[int]) -> list[Example]:
        return [self.example(number) for number in numbers]

    def example(self, number: int) -> Example:
        key = self.seed, number
        pixels, label = self.bad_images.read(self.source, self.index(number), key, self._read)
        if self.flip and derive_seed(*key, 2) % 2:
            pixels = pixels[:, ::-1].copy()
        grid, chosen, shrunk = self.draw(number, pixels.shape[:2])
        patches = resized_patches(pixels, grid, self.patch, self.in_chans).numpy()[chosen]
        return Example(number, label, patches, coordinates_of(*grid).numpy()[chosen], grid, shrunk)

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        return self.source.load(index).decode(), self.source.label(index)


class EvalPatches(EvalDataset):
    """(packed images, labels, indices) of images to evaluate on, whole, at one effective resolution (0: their own).

    Those of more patches a side than the network has positions for are shrunk.
    """

    def __init__(self, source: ImageSource, resolution: float, network: NaViT, bad_images: BadImages):
        super().__init__(source, np.asarray, bad_images)
        self.resolution, self.patch, self.in_chans = resolution, network.patch_size, network.patch_embed.in_channels
        self.longest = sys.maxsize, network.pos_embed.most_a_side

    def __getitems__(self, positions: Sequence[int]) -> tuple[Packed, Tensor, Tensor]:
        pixels, *numbers = zip(*(self[position] for position in positions), strict=True)
        sizes = (image.shape[:2] for image in pixels)
        chosen = (choose_grid(size, self.resolution, self.patch, np.arange, self.longest) for size in sizes)
        grids, _, shrunk = zip(*chosen, strict=True)
        patches = [resized_patches(image, g, self.patch, self.in_chans) for image, g in zip(pixels, grids, strict=True)]
        packed = pack(patches, [coordinates_of(*g) for g in grids], grids)
        packed.shrunk = shrunk
        return packed, *map(torch.tensor, numbers)


# --- The loader -------------------------------------------------------------------------------------------------------


def numbers(first: int) -> Iterator[list[int]]:
    """Chunks of the numbers of this process's images from ``first`` on, without an end: every W-th of the run's."""
    step = CHUNK * distributed.get_world_size()
    for start in itertools.count(first, step):
        yield list(range(start, start + step, distributed.get_world_size()))


class PackedBatches:
    """Batches of ``sequences`` sequences, and the images of those that are no batch yet.

    Args:
        ahead: Further sequences that are open at a time: more of them leave less padding, and delay images.
        images_of_run: Over which ``tokens`` are averaged, where a schedule changes them; None: the first ones.

    Attributes:
        tokens: About how many an image has, after dropping.
        batch_size: About how many images a step takes, on all processes.
        shown: Some sequences of the last batch.
    """

    def __init__(
        self,
        data: TrainPatches,
        sequence_length: int,
        sequences: int,
        num_workers: int = 0,
        ahead: int = 16,
        images_of_run: int | None = None,
    ):
        self.data, self.sequence_length, self.sequences = data, sequence_length, sequences
        self.num_workers, self.ahead = num_workers, ahead
        drawn = np.linspace(0, images_of_run or 256, 256, endpoint=False).astype(int).tolist()
        self.tokens = float(np.mean([len(data.draw(number, (1000, 1000))[1]) for number in drawn]))
        images = sequence_length * sequences * distributed.get_world_size() / self.tokens
        self.checksum = data.source.checksum()
        self.batch_size, self.steps_per_epoch = max(1, round(images)), max(1, round(len(data.source) / images))
        self.next = distributed.get_rank()  # number of the first image of this process that has not been read
        self.waiting: list[Example] = []  # the images of open sequences, as they came
        self.shown: list[list[Example]] = []
        self.examples: Iterator[Example] | None = None

    def epoch(self, first_step: int) -> Iterator[dict]:
        """The batches of an epoch from this step on."""
        for _ in range(first_step, self.steps_per_epoch):
            tokens = sum(len(e.patches) for e in self.waiting)
            while tokens < (self.sequences + self.ahead) * self.sequence_length:
                self.waiting.append(self._read())
                tokens += len(self.waiting[-1].patches)
            lengths = [len(e.patches) for e in self.waiting]
            places = first_fit(lengths, self.sequence_length)
            is_due = places.sequence < self.sequences
            self.shown = [list(itertools.compress(self.waiting, places.sequence == i)) for i in range(4)]
            batch = list(itertools.compress(self.waiting, is_due))
            self.waiting = list(itertools.compress(self.waiting, ~is_due))  # the next time they will lie as now
            yield self._batch(batch, torch.from_numpy(places.slots[np.repeat(is_due, lengths)]))

    def _batch(self, examples: Sequence[Example], slots: Tensor) -> dict:
        """Plain tensors: arguments of :class:`Packed`, labels (E,), and what the log says of the packing."""
        patches, coords = ([torch.from_numpy(getattr(e, name)) for e in examples] for name in ("patches", "coords"))
        images = pack(patches, coords, [e.grid for e in examples], slots, (self.sequences, self.sequence_length))
        packing = {
            "resolution": self.data.patch * float(np.mean([math.sqrt(math.prod(e.grid)) for e in examples])),
            "tokens": len(slots) / len(examples),
            "images_per_sequence": len(examples) / self.sequences,
            "padding": 1 - len(slots) / math.prod(images.shape),
            "shrunk": float(np.mean([e.shrunk for e in examples])),
        }
        return {"images": vars(images), "labels": torch.tensor([e.label for e in examples]), "packing": packing}

    def _read(self) -> Example:
        if self.examples is None:
            loader = make_loader(self.data, batch_sampler=numbers(self.next), num_workers=self.num_workers)
            self.examples = (example for chunk in loader for example in chunk)
        self.next += distributed.get_world_size()
        return next(self.examples)

    def state_dict(self) -> dict:
        """Every process's place in the run, and the images of its open sequences; all of them call this."""
        own = {"next": self.next, "waiting": [e.number for e in self.waiting]}
        return {"processes": distributed.all_gather_object(own)}

    def load_state_dict(self, state: dict) -> None:
        """Go on there; with another number of processes, images are dealt out anew: those of open sequences, and those
        that a process had not reached while the one furthest ahead was beyond them.
        """
        processes, rank, world_size = state["processes"], distributed.get_rank(), distributed.get_world_size()
        if len(processes) == world_size:
            self.next, waiting = processes[rank]["next"], processes[rank]["waiting"]
        else:
            furthest = max(process["next"] for process in processes)
            passed = (range(process["next"], furthest, len(processes)) for process in processes)
            waiting = sorted(itertools.chain(*passed, *(process["waiting"] for process in processes)))[rank::world_size]
            self.next = furthest + rank
        self.waiting = self.data.__getitems__(waiting)
