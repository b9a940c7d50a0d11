"""Loading in an order and with replacements that depend on nothing but seeds.

``open_source`` (``sources.py``) understands ``--data_path``; :class:`EpochBatchSampler` and :func:`make_loader` feed
training, :class:`EvalDataset` feeds evaluation, :class:`BadImages` decides what a broken file does to a run.
"""

import atexit
import contextlib
import math
import multiprocessing.queues
import os
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shared import distributed
from shared.run.memory import NO_SHARED_MEMORY
from shared.run.randomness import derive_seed

from .decode import ImageError
from .sources import ImageSource, locked

T = TypeVar("T")
LEFT_OUT = -2  # in place of the label of an image that cannot be read
MAX_ASPECT = 64  # of an image that is resized as a whole for a centre crop


class BadImages:
    """What happens when an image cannot be read: another one takes its place, it is left out, or the run stops.

    Args:
        num_images: Size of the data set.
        list_path: File that gets one line per bad image, ``path<TAB>reason``, whichever process meets it first; a run
            that resumes goes on with the same list. None keeps the list in memory, per process.
        on_bad_image: ``replace``, ``error``, or ``skip``: an :class:`EvalDataset` gives it the label ``LEFT_OUT``.
        max_fraction: The run stops when more than this share of the images (and more than one) is bad.
    """

    def __init__(
        self,
        num_images: int,
        list_path: str | os.PathLike | None = None,
        on_bad_image: str = "replace",
        max_fraction: float = 0.01,
    ):
        if on_bad_image not in ("replace", "skip", "error"):
            raise ValueError(f"--on_bad_image {on_bad_image!r} is none of replace, skip, error")
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"--max_bad_fraction {max_fraction} is outside [0, 1]")
        self.num_images = num_images
        self.list_path = None if list_path is None else Path(list_path)
        self.on_bad_image = on_bad_image
        self.max_fraction = max_fraction
        self.limit = max(1, math.floor(max_fraction * num_images))
        self._known: set[str] = set()

    @classmethod
    def with_new_list(cls, num_images: int, list_path: Path, *policy) -> "BadImages":
        """With a list of this call alone; every process must call this."""
        if distributed.is_main_process():
            list_path.parent.mkdir(parents=True, exist_ok=True)
            list_path.unlink(missing_ok=True)
        distributed.barrier()
        return cls(num_images, list_path, *policy)

    def count(self) -> int:
        """Number of bad images met so far (by all processes, with a ``list_path``)."""
        return len(self._known if self.list_path is None else self._listed())

    def rows(self, source: ImageSource) -> list[int]:
        """Indices of those images of ``source`` that are on the list."""
        listed = self._listed()
        return [i for i in range(len(source)) if _on_one_line(source.path(i)) in listed] if listed else []

    def read(self, source: ImageSource, index: int, key: Sequence[int], process: Callable[[int], T]) -> T:
        """``process(index)``, or ``process`` of the first readable replacement.

        Args:
            key: Integers that fix the replacements, such as (seed, epoch, index).

        Raises:
            ImageError: If there are too many bad images or ``on_bad_image`` is ``error``.
        """
        candidate = index
        for attempt in range(100):
            try:
                return process(candidate)
            except ImageError as error:
                self.report(source.path(candidate), error)
            candidate = derive_seed(*key, attempt) % self.num_images
        raise ImageError(f"{source.path(index)} and 100 replacements for it cannot be read")

    def report(self, path: str, error: ImageError) -> None:
        """Count an image that cannot be read; raises as :meth:`read` does."""
        if self.on_bad_image == "error":
            raise error
        if path in self._known:
            return
        self._known.add(path)
        if self.list_path is not None:
            reason = str(error).removeprefix(f"{path}: ")
            self._append(_on_one_line(path), f"{_on_one_line(path)}\t{_on_one_line(reason)}")
        if (count := self.count()) > self.limit:
            listed = "" if self.list_path is None else f", see {self.list_path}"
            raise ImageError(
                f"{count} of {self.num_images} images cannot be read, and --max_bad_fraction {self.max_fraction:g} "
                f"allows {self.limit}: remove them or raise it{listed}; the last one: {error}"
            )

    def _append(self, path: str, line: str) -> None:
        with locked(self.list_path):
            listed = self._listed()
            if path not in listed:
                with open(self.list_path, "a", encoding="utf-8", errors="surrogateescape") as file:
                    file.write(line + "\n")

    def _listed(self) -> set[str]:
        if not self.list_path.exists():
            return set()
        with open(self.list_path, encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
            return {line.partition("\t")[0] for line in lines}


def tell_unreadable(folder: Path) -> list[str]:
    """Sentences about the images of a run that could not be read, by the lists in its folder."""
    lists = [folder / name for name in ("bad_images.txt", "bad_images_val.txt")]
    counts = [(BadImages(0, file).count(), file) for file in lists]
    return [f"unreadable images, in whose places others were read: {n}, see {file}" for n, file in counts if n]


def _on_one_line(text: str) -> str:
    """The text with its tabs and line ends written out, for a list with one line an image."""
    return text.translate({ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"})


def short_side(source: ImageSource, sample: int = 16) -> float:
    """Median of the shorter sides, in pixels, of a few images spaced evenly over the source; infinite if none of them
    can be read, which is for others to say.
    """
    sides = []
    for index in np.linspace(0, len(source) - 1, min(sample, len(source))).astype(int).tolist():
        with contextlib.suppress(ImageError):
            image = source.load(index)
            sides.append(min(image.height, image.width))
    return int(np.median(sides)) if sides else math.inf


# --------------------------------------------------------------------------------------------- evaluation and loading


class EvalTransform:
    """Resize the short side (antialiased as Pillow does it), crop the centre, normalise.

    Args:
        resize_px: Short side after resizing.
        crop_px: Side of the centre crop.
        mean, std: Per channel, for pixels in [0, 1]; without them the result stays uint8. One channel takes the
            averages over the channels.
        in_chans: 3, or 1 for the luminance.
        interpolation: ``bicubic`` or ``bilinear``.
    """

    def __init__(
        self,
        resize_px: int = 256,
        crop_px: int = 224,
        mean=None,
        std=None,
        in_chans: int = 3,
        interpolation: str = "bicubic",
    ):
        if crop_px > resize_px:
            raise ValueError(f"a centre crop of {crop_px} pixels does not fit into a short side of {resize_px}")
        self.resize_px, self.crop_px, self.in_chans = resize_px, crop_px, in_chans
        self.interpolation = interpolation
        self.mean, self.std = (
            None if values is None else torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
            for values in (mean, std)
        )
        if in_chans == 1 and mean is not None:
            self.mean, self.std = self.mean.mean(dim=0, keepdim=True), self.std.mean(dim=0, keepdim=True)

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """RGB pixels (H, W, 3), uint8, to (C, crop_px, crop_px): float32 when normalised, else uint8.

        Float pixels (H, W, C) are normalised already, see :mod:`shared.images.channels`.
        """
        pixels = centre_of_a_strip(pixels)
        height, width = pixels.shape[:2]
        short = min(height, width)
        size = (int(self.resize_px * height / short), int(self.resize_px * width / short))
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        image = F.interpolate(image, size=size, mode=self.interpolation, antialias=True)[0]
        top, left = (round((side - self.crop_px) / 2) for side in size)
        image = image[:, top : top + self.crop_px, left : left + self.crop_px]
        if image.is_floating_point():
            return image.contiguous()
        if self.in_chans == 1:
            from torchvision.transforms.functional import rgb_to_grayscale  # here: the import takes a second

            image = rgb_to_grayscale(image)
        if self.mean is None:
            return image.contiguous()
        return (image.float() / 255 - self.mean) / self.std


def centre_of_a_strip(pixels: np.ndarray) -> np.ndarray:
    """The middle of an extremely long image, of which a crop is made: resized as a whole it would take gigabytes."""
    sides = pixels.shape[:2]
    short, long = min(sides), max(sides)
    if long <= MAX_ASPECT * short:
        return pixels
    start = (long - MAX_ASPECT * short) // 2
    kept = slice(start, start + MAX_ASPECT * short)
    return pixels[kept] if sides[0] == long else pixels[:, kept]


class EvalDataset(Dataset):
    """(image, label, index) of a source, in its order; the label is -1 where there are no classes.

    For an image that cannot be read these are another image, its label or ``LEFT_OUT``, and its index.

    Args:
        transform: Maps RGB pixels (H, W, 3), uint8, to a tensor.
        bad_images: Policy for images that cannot be read; by default the first one is an error.
        rows: Only these images of the source, in this order.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[np.ndarray], Tensor],
        bad_images: BadImages | None = None,
        rows: Sequence[int] | None = None,
    ):
        self.source = source
        self.transform = transform
        self.bad_images = bad_images or BadImages(len(source), on_bad_image="error")
        self.rows = range(len(source)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        index = self.rows[position]
        image, label, read = self.bad_images.read(self.source, index, (index,), self._read)
        is_left_out = read != index and self.bad_images.on_bad_image == "skip"
        return image, LEFT_OUT if is_left_out else label, read

    def _read(self, index: int) -> tuple[Tensor, int, int]:
        return self.transform(self.source.load(index).decode()), self.source.label(index), index


class EpochBatchSampler:
    """Batches of (epoch, index) keys, the same on every run, resumable inside an epoch.

    The order is that of torch's ``DistributedSampler``: a permutation seeded with ``seed + epoch``, padded with its own
    beginning to a multiple of ``world_size``, of which rank r takes every ``world_size``-th from r on.

    Args:
        num_samples: Size of the data set.
        batch_size: Images per process.
        drop_last: Leave out the last, smaller batch.
        flag: Of the batch size, for the message.

    Raises:
        ValueError: If there are fewer images per process than a batch takes.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        flag: str = "--batch_size",
    ):
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.epoch = self.start_step = 0
        if batch_size < 1 or len(self) < 1:
            raise ValueError(
                f"{num_samples} images on {world_size} process(es) do not fill one batch of {batch_size} per process: "
                f"take {flag} {max(1, num_samples // world_size // 8 * 2)}"  # four steps; even, as Mixup takes pairs
            )

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        per_rank = -(-self.num_samples // self.world_size)
        return per_rank // self.batch_size if self.drop_last else -(-per_rank // self.batch_size)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the next epoch and how many of its batches were done already; those are not loaded."""
        self.epoch, self.start_step = epoch, start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator).numpy()
        per_rank = -(-self.num_samples // self.world_size)
        mine = np.resize(order, per_rank * self.world_size)[self.rank :: self.world_size]
        for step in range(self.start_step, len(self)):
            batch = mine[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, index) for index in batch.tolist()]


def make_loader(
    dataset: Dataset,
    *,
    batch_sampler: EpochBatchSampler | None = None,
    batch_size: int | None = None,
    sampler: Iterable[int] | None = None,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    prefetch_factor: int = 2,
) -> DataLoader:
    """A loader whose batches do not depend on ``num_workers``.

    Workers persist, prefetch, and compute with one thread each; batches are pinned when ``device`` is a GPU.

    Args:
        batch_sampler: For training; otherwise ``batch_size`` and optionally ``sampler``, in order and complete.
    """
    how = {"batch_sampler": batch_sampler} if batch_sampler else {"batch_size": batch_size, "sampler": sampler}
    return _Loader(
        dataset,
        num_workers=num_workers,
        collate_fn=_as_is if hasattr(dataset, "__getitems__") else None,
        pin_memory=torch.device(device).type == "cuda",
        persistent_workers=num_workers > 0,
        prefetch_factor=prefetch_factor if num_workers > 0 else None,
        worker_init_fn=_start_worker,
        **how,
    )


class _Loader(DataLoader):
    """Gives a worker's error as it was raised, or says which worker has died and how; ends its workers at exit."""

    ends_at_exit = None  # the iterator whose workers are seen to

    def __iter__(self) -> Iterator:
        # OpenCV's threads do not live on in a forked worker, which would wait for them forever: end them here
        cv2.setNumThreads(1)
        iterator = super().__iter__()
        if self.num_workers and iterator is not self.ends_at_exit:  # a process's workers persist over epochs
            self.ends_at_exit = iterator
            atexit.register(_end_workers, weakref.ref(iterator), iterator._workers)
            # the same in a child of multiprocessing; at 10 its queues close
            Finalize(None, _end_workers, (weakref.ref(iterator), iterator._workers), exitpriority=11)
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except ImageError as error:  # torch has put the worker's traceback around the message
                raise ImageError(str(error).rpartition("ImageError: ")[2].strip()) from error
            except (RuntimeError, OSError, EOFError) as error:
                for worker in getattr(iterator, "_workers", ()):
                    worker.join(timeout=0.1)
                codes = {w.pid: w.exitcode for w in getattr(iterator, "_workers", ()) if w.exitcode}
                for pid, code in codes.items():
                    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                    raise RuntimeError(f"DataLoader worker (pid {pid}) has died: {how}") from error
                raise
            yield batch


def default_num_workers(most: int = 10) -> int:
    """Loader processes per rank: this process's share of the machine's cores, less one for the training itself."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min(most, cores - 1))


def _as_is(batch):
    return batch  # the data set assembled it


def _end_workers(iterator: weakref.ref, workers: list) -> None:
    """Have the workers return, before ``multiprocessing`` sends them SIGTERM, which they ignore, and waits for them."""
    if (living := iterator()) is not None:
        living._shutdown_workers()  # what torch does when nothing, such as a traceback, refers to the iterator any more
    for worker in workers:
        worker.kill()  # one that was not told: the garbage collector may close the queues before torch does that


def _end_without_shared_memory(error: BaseException, batch) -> None:
    """What the thread does that puts a batch into shared memory, where it fails.

    Nobody would see its error, and the training would wait for the batch for ever.
    """
    os._exit(NO_SHARED_MEMORY)


def _start_worker(worker_id: int) -> None:
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_without_shared_memory)
    if cv2.getNumThreads() != 1:  # a worker that was started afresh; torch sets its own threads
        cv2.setNumThreads(1)
    # these are for the main process, which saves and then ends its workers; schedulers may send them to every process
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
