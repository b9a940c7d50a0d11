"""Packing images of different lengths into sequences, and the loader of packed batches.

Images arrive in an order that depends on the seed alone. Each goes into the first open sequence with enough room; when
none has, the fullest one is closed, and so many closed sequences are a batch. Which images lie in sequences that are
still open is part of the checkpoint: a run that was killed goes on with the same batches, with any number of workers.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from shared import distributed
from shared.images.decode import DecodedImage, ImageError
from shared.images.loading import BadImages, EvalDataset, make_loader
from shared.images.sources import ImageSource, open_source
from shared.run.randomness import derive_seed

from .native_resolution_vit import Packed, coordinates_of
from .sampling import Dropping, Resolutions, fitting_size, nearest_grid

CHUNK = 8  # images that a worker reads at a time
END_OF_TEXT = 256  # after the bytes of a text


class Placement(NamedTuple):
    """Where images lie."""

    sequence: np.ndarray  # of each image, (E,)
    offset: np.ndarray  # in it, (E,)
    kept: np.ndarray  # whether it is among the first ``max_images`` of its sequence, (E,)
    slots: np.ndarray  # place of every token, image by image, counted through all sequences, (N,)
    shape: tuple[int, int]  # number of sequences and their length


def first_fit(lengths: Sequence[int], sequence_length: int, max_images: int | None = None) -> Placement:
    """Put images of these lengths, in this order, each into the first sequence with enough room (appendix A.3).

    Args:
        max_images: Representations of a sequence that count; further images are only encoded.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.max() > sequence_length:
        raise ValueError(f"an image of {lengths.max()} tokens is longer than a sequence of {sequence_length}")
    room, filled = np.full(len(lengths), sequence_length), np.zeros_like(lengths)
    sequence, offset, place = (np.zeros_like(lengths) for _ in range(3))
    opened = 0
    for i, n in enumerate(lengths):
        s = int(np.argmax(room[: opened + 1] >= n))  # the one after the open ones is empty
        opened = max(opened, s + 1)
        sequence[i], offset[i], place[i] = s, sequence_length - room[s], filled[s]
        room[s] -= n
        filled[s] += 1
    within = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    slots = np.repeat(sequence * sequence_length + offset, lengths) + within
    kept = np.full(len(lengths), True) if max_images is None else place < max_images
    return Placement(sequence, offset, kept, slots, (opened, sequence_length))


# --- Images as patches ------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """An image as the loader's workers give it."""

    number: int  # of the image in the run
    index: int
    label: int
    patches: np.ndarray  # uint8 or normalised float32, (n, patch * patch * C), those that were not dropped
    coords: np.ndarray  # (n, 2)
    grid: tuple[int, int]  # rows and columns of the whole image
    shrunk: bool  # whether it was made smaller than drawn, to fit into a sequence


def choose_grid(
    size: tuple[int, int], resolution: float, patch: int, kept: Callable, longest: tuple[int, int] | None
) -> tuple[tuple[int, int], np.ndarray, bool]:
    """Grid of an image at an effective resolution, its tokens that are kept, and whether it was shrunk.

    Args:
        kept: Maps a number of tokens to those that are kept.
        longest: Tokens that are kept, and patches a side, beyond which an image is shrunk; None: none is.
    """
    grid, shrunk = nearest_grid(size, resolution, patch), False
    if longest is not None and max(grid) > longest[1]:
        grid, shrunk = nearest_grid(size, resolution * longest[1] / max(grid), patch), True
        grid = tuple(min(side, longest[1]) for side in grid)
    chosen = kept(grid[0] * grid[1])
    while longest is not None and len(chosen) > longest[0]:
        fitting = int(longest[0] * grid[0] * grid[1] / len(chosen))
        grid, shrunk = tuple(side // patch for side in fitting_size(size, fitting, patch)), True
        chosen = kept(grid[0] * grid[1])
    return grid, chosen, shrunk


def resized_patches(pixels: np.ndarray, grid: tuple[int, int], patch: int, in_chans: int) -> np.ndarray:
    """Patches (rows * columns, patch * patch * C) of an image (H, W, C), resized to the grid, antialiased.

    Args:
        pixels: RGB, uint8, of which ``in_chans`` 1 takes the luminance; or normalised float32 of any channels.
    """
    size = tuple(side * patch for side in grid)
    if pixels.shape[:2] != size:
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        image = F.interpolate(image, size=size, mode="bilinear", antialias=True)
        pixels = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    if in_chans == 1 and pixels.shape[2] == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return pixels.reshape(grid[0], patch, grid[1], -1).swapaxes(1, 2).reshape(grid[0] * grid[1], -1)


class TrainPatches(Dataset):
    """Examples by the numbers of images in the run: number g is image g modulo N of the permutation g // N.

    Args:
        draws: Resolutions, dropping, and the seed of all draws.
        longest: See :func:`choose_grid`.
        flip: Whether half of the images are mirrored.
    """

    def __init__(
        self,
        source: ImageSource,
        patch: int,
        draws: tuple[Resolutions, Dropping, int],
        bad_images: BadImages,
        longest: tuple[int, int] | None = None,
        flip: bool = True,
        in_chans: int = 3,
    ):
        self.source, self.patch, self.bad_images, self.longest = source, patch, bad_images, longest
        (self.resolutions, self.dropping, self.seed), self.flip, self.in_chans = draws, flip, in_chans
        self.order = (-1, np.empty(0))

    def index(self, number: int) -> int:
        epoch, place = divmod(number, len(self.source))
        if self.order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self.order = epoch, torch.randperm(len(self.source), generator=generator).numpy()
        return int(self.order[1][place])

    def shape(self, number: int, size: tuple[int, int]) -> tuple[tuple[int, int], np.ndarray, bool]:
        """:func:`choose_grid` with the draws of this image in the run."""
        resolution = self.resolutions.draw(size, np.random.default_rng(derive_seed(self.seed, number, 0)))

        def kept(length: int) -> np.ndarray:
            return self.dropping.draw(length, number, np.random.default_rng(derive_seed(self.seed, number, 1)))

        return choose_grid(size, resolution, self.patch, kept, self.longest)

    def __getitems__(self, numbers: Sequence[int]) -> list[Example]:
        return [self.example(number) for number in numbers]

    def example(self, number: int) -> Example:
        key = self.seed, number
        pixels, index = self.bad_images.read(self.source, self.index(number), key, self._read)
        if self.flip and derive_seed(*key, 2) % 2:
            pixels = pixels[:, ::-1].copy()
        grid, chosen, shrunk = self.shape(number, pixels.shape[:2])
        patches = resized_patches(pixels, grid, self.patch, self.in_chans)[chosen]
        coords = coordinates_of(*grid).numpy()[chosen]
        return Example(number, index, self.source.label(index), patches, coords, grid, shrunk)

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        return self.source.load(index).decode(), index

    def mean_length(self, sample: int = 256) -> float:
        """Mean tokens that are kept of the first images of the run; only their sizes are read."""
        lengths = []
        for number in range(min(sample, len(self.source))):
            with contextlib.suppress(ImageError):
                image = self.source.load(self.index(number))
                lengths.append(len(self.shape(number, (image.height, image.width))[1]))
        return float(np.mean(lengths or [1]))


class CutMaterials(ImageSource):
    """The generated images of 32 pixels, each cut to a rectangle of its own: sides of 14 to 32, shapes up to 1 : 2."""

    def __init__(self, split: str):
        self.squares = open_source(None, split)
        name = self.squares.name.replace("materials", "materials of many shapes")
        super().__init__(name, self.squares.labels, self.squares.classes)
        rng = np.random.default_rng(len(self))
        longest, turn = rng.integers(20, 33, len(self)), rng.uniform(-1, 1, (1, len(self))) * [[1], [-1]]
        self.shapes = (longest / 2 ** np.maximum(turn, 0)).round().clip(14).astype(int)  # (height, width) of each

    def __len__(self) -> int:
        return len(self.squares)

    def path(self, index: int) -> str:
        return self.squares.path(index)

    def load(self, index: int) -> DecodedImage:
        pixels = self.squares.load(index).decode()
        rows, columns = (slice((32 - side) // 2, (32 - side) // 2 + side) for side in self.shapes[:, index])
        return DecodedImage(np.ascontiguousarray(pixels[rows, columns]))

    def checksum(self) -> int:
        return self.squares.checksum()


class EvalPatches(EvalDataset):
    """Examples of the images to evaluate on, whole, in their order, at one effective resolution (0: their own)."""

    def __init__(self, source: ImageSource, resolution: float, patch: int, in_chans: int, bad_images: BadImages):
        super().__init__(source, np.asarray, bad_images)
        self.resolution, self.patch, self.in_chans = resolution, patch, in_chans

    def __getitems__(self, positions: Sequence[int]) -> list[Example]:
        examples = []
        for position in positions:
            pixels, label, index = self[position]
            grid = nearest_grid(pixels.shape[:2], self.resolution, self.patch)
            patches = resized_patches(pixels, grid, self.patch, self.in_chans)
            examples.append(Example(position, index, label, patches, coordinates_of(*grid).numpy(), grid, False))
        return examples


def pack(examples: Sequence[Example], mean: Sequence[float], std: Sequence[float], *places) -> Packed:
    """Images as the network takes them; ``places`` are the slots and the shape.

    Pixels of uint8 are normalised by channel; floats, of images of other channels, are so already.
    """
    patches, coords = ([torch.from_numpy(getattr(e, name)) for e in examples] for name in ("patches", "coords"))
    packed = Packed.of(patches, coords, [e.grid for e in examples], *places)
    if not packed.patches.is_floating_point():
        pixels = packed.patches.unflatten(1, (-1, len(mean))) / 255
        packed.patches = ((pixels - torch.tensor(mean)) / torch.tensor(std)).flatten(1)
    return packed


def pack_texts(texts: Sequence[str], most: int) -> Packed:
    """Texts as their first bytes, at most ``most`` with the end."""
    words = [torch.tensor([*text.encode()[: most - 1], END_OF_TEXT]) for text in texts]
    return Packed.of(words, [coordinates_of(1, len(w)) for w in words], [(1, len(w)) for w in words])


def collate(
    sequences: Sequence[Sequence[Example]], length: int, patch: int, max_images: int | None, *statistics
) -> dict:
    """A batch of sequences of ``length`` tokens as plain tensors, images of one length next to each other.

    Returns:
        ``images``: arguments of :class:`Packed`; ``labels``, ``indices`` and ``counts``, whether an image has a loss,
        (E,); ``packing``: what the log says.
    """
    placed = []
    for i, sequence in enumerate(sequences):
        ends = np.cumsum([0, *(len(e.patches) for e in sequence)]) + i * length
        placed += [(e, int(ends[k]), max_images is None or k < max_images) for k, e in enumerate(sequence)]
    examples, starts, counts = zip(*sorted(placed, key=lambda entry: len(entry[0].patches)), strict=True)
    lengths = [len(e.patches) for e in examples]
    slots = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
    shape = len(sequences), length
    packing = {
        "resolution": float(np.mean([patch * np.sqrt(np.prod(e.grid)) for e in examples])),
        "tokens": float(np.mean(lengths)),
        "images_per_sequence": len(examples) / len(sequences),
        "padding": 1 - sum(lengths) / (shape[0] * length),
        "shrunk": float(np.mean([e.shrunk for e in examples])),
        "left_out": 1 - float(np.mean(counts)),
    }
    labels, indices = (torch.tensor([getattr(e, name) for e in examples]) for name in ("label", "index"))
    batch = {"labels": labels, "indices": indices, "counts": torch.tensor(counts), "packing": packing}
    return {"images": vars(pack(examples, *statistics, slots, shape)), **batch}


# --- The loader -------------------------------------------------------------------------------------------------------


def numbers(first: int) -> Iterator[list[int]]:
    """Chunks of the numbers of this process's images from ``first`` on, without an end: every W-th of the run's."""
    step = CHUNK * distributed.get_world_size()
    for start in itertools.count(first, step):
        yield list(range(start, start + step, distributed.get_world_size()))


class PackedBatches:
    """Batches of ``sequences`` sequences, see :func:`collate`, and the images of those that are not full yet.

    Args:
        max_open: Sequences that are open at a time: more of them leave less padding, and delay images.
        max_images: See :func:`first_fit`.
        statistics: Mean and standard deviation of the channels.
    """

    def __init__(
        self,
        data: TrainPatches,
        sequence_length: int,
        sequences: int,
        steps_per_epoch: int,
        num_workers: int = 0,
        max_open: int = 16,
        max_images: int | None = None,
        statistics: tuple[Sequence[float], Sequence[float]] = ((0.5,) * 3, (0.5,) * 3),
    ):
        self.data, self.sequence_length, self.sequences = data, sequence_length, sequences
        self.steps_per_epoch, self.num_workers, self.max_open = steps_per_epoch, num_workers, max_open
        self.how = sequence_length, data.patch, max_images, *statistics
        self.next = distributed.get_rank()  # number of the first image of this process that has not been read
        self.open, self.closed = [], []  # sequences that are no batch yet, lists of examples
        self.shown = []  # the first sequences of the last batch
        self.examples: Iterator[Example] | None = None

    def epoch(self, first_step: int) -> Iterator[dict]:
        """The batches of an epoch from this step on."""
        for _ in range(first_step, self.steps_per_epoch):
            while len(self.closed) < self.sequences:
                self._add(self._read())
            batch, self.closed = self.closed[: self.sequences], self.closed[self.sequences :]
            self.shown = batch[:4]
            yield collate(batch, *self.how)

    def _read(self) -> Example:
        if self.examples is None:
            loader = make_loader(self.data, batch_sampler=numbers(self.next), num_workers=self.num_workers)
            self.examples = (example for chunk in loader for example in chunk)
        self.next += distributed.get_world_size()
        return next(self.examples)

    def _add(self, example: Example) -> None:
        length = len(example.patches)
        if length > self.sequence_length:
            raise ValueError(
                f"{self.data.source.path(example.index)} has {length} tokens of {example.grid[0]}x{example.grid[1]} "
                f"patches, more than --sequence_length {self.sequence_length}: raise that, or --on_long_image shrink"
            )
        room = np.array([self.sequence_length - sum(len(e.patches) for e in sequence) for sequence in self.open])
        if (room >= length).any():
            self.open[int(np.argmax(room >= length))].append(example)
            return
        if len(self.open) == self.max_open:
            self.closed.append(self.open.pop(int(room.argmin())))
        self.open.append([example])

    def state_dict(self) -> dict:
        """Every process's place in the run, and the images of its unfinished sequences; all of them call this."""
        own = {name: [[e.number for e in s] for s in getattr(self, name)] for name in ("open", "closed")}
        return {"processes": distributed.all_gather_object({"next": self.next} | own)}

    def load_state_dict(self, state: dict) -> None:
        """Go on there; with another number of processes, images of unfinished sequences are dealt out anew."""
        processes, rank, world_size = state["processes"], distributed.get_rank(), distributed.get_world_size()
        if len(processes) == world_size:
            self.next = processes[rank]["next"]
            for name in ("open", "closed"):
                setattr(self, name, [self.data.__getitems__(numbers) for numbers in processes[rank][name]])
            return
        self.next = max(process["next"] for process in processes) + rank
        waiting = sorted(n for p in processes for name in ("open", "closed") for s in p[name] for n in s)
        for example in self.data.__getitems__(waiting[rank::world_size]):
            self._add(example)
