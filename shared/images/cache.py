"""Images decoded once: in memory for small data sets, in a file that all processes map for large ones."""

import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from shared.run.memory import container_limit

from .decode import DecodedImage, EncodedImage, ImageError
from .sources import ArraySource, ImageSource, locked

MEMORY_SHARE = 0.8  # of the memory that is free when the cache is made


class CachedSource(ImageSource):
    """A source whose pixels lie in one array, image after image.

    Args:
        source: Where the images come from; still asked for those that could not be decoded.
        layout: First value, height and width of every image, int64, shape (N, 3); height 0 where decoding failed.
        pixels: Values of all images, flat.
    """

    def __init__(self, source: ImageSource, layout: np.ndarray, pixels: np.ndarray):
        super().__init__(source.name, source.labels, source.classes)
        self.source, self.layout, self.pixels, self.channels = source, layout, pixels, source.channels

    def __len__(self) -> int:
        return len(self.source)

    def path(self, index: int) -> str:
        return self.source.path(index)

    def load(self, index: int) -> EncodedImage | DecodedImage:
        start, height, width = self.layout[index].tolist()
        if height == 0:
            return self.source.load(index)
        depth, _ = _values_of(self.source)
        return DecodedImage(self.pixels[start : start + depth * height * width].reshape(height, width, depth))

    def checksum(self) -> int:
        return self.source.checksum()


def cache_images(source: ImageSource, cache: str) -> ImageSource:
    """``source`` with every image decoded once; its pixels and so all views stay the same.

    Loader workers share the pixels. Images that cannot be decoded are left to the source, and so to the policy for bad
    images. Scaled decoding is lost: the views of large photographs differ in rounding from those without a cache.

    Args:
        cache: ``none``; ``memory``, one copy per training process; or a folder for a file that all processes of a
            machine share, and later runs too as long as names, sizes and times of the images are the same.

    Raises:
        ValueError: If the decoded images do not fit.
    """
    if cache == "none" or isinstance(source, ArraySource):
        return source
    if cache == "memory":
        layout, size = _plan(source)
        pixels_type = _values_of(source)[1]
        _check_fits(size * pixels_type().nbytes, _free_memory(), "free memory", f"--cache memory: {source.describe()}")
        pixels = np.empty(size, pixels_type)
        _decode_all(source, layout, pixels)
        return CachedSource(source, layout, pixels)
    folder = Path(cache)
    folder.mkdir(parents=True, exist_ok=True)
    key = _fingerprint(source)
    layout_file, pixels_file = folder / f"{key}.layout.npy", folder / f"{key}.pixels"
    with locked(folder / f"{key}.lock"):  # one process fills the file, the others wait for it
        if not layout_file.exists():
            _fill_files(source, layout_file, pixels_file)
    # "c": a private mapping that may be written to, as torch demands of arrays that it wraps
    return CachedSource(
        source, np.load(layout_file), np.asarray(np.memmap(pixels_file, _values_of(source)[1], mode="c"))
    )


def _fill_files(source: ImageSource, layout_file: Path, pixels_file: Path) -> None:
    """Write the pixels, then the layout: where the second file exists, the first is complete."""
    layout, size = _plan(source)
    folder, pixels_type = pixels_file.parent, _values_of(source)[1]
    size *= pixels_type().nbytes
    _check_fits(size, shutil.disk_usage(folder).free, "free disk space", f"--cache {folder}: {source.describe()}")
    with open(pixels_file, "wb") as file:
        # Without reserved blocks, a disk that fills up would kill the process when it writes to the mapping.
        os.posix_fallocate(file.fileno(), 0, size)
    pixels = np.memmap(pixels_file, pixels_type, mode="r+")
    _decode_all(source, layout, pixels)
    pixels.flush()
    temporary = layout_file.with_suffix(".tmp.npy")
    np.save(temporary, layout)
    os.replace(temporary, layout_file)


def _values_of(source: ImageSource) -> tuple[int, type]:
    """Values of a decoded pixel, and their type."""
    return (3, np.uint8) if source.channels is None else (source.channels.number, np.float32)


def _plan(source: ImageSource) -> tuple[np.ndarray, int]:
    """The layout of all images from their headers, and its size in values."""
    layout = np.zeros((len(source), 3), dtype=np.int64)

    def read(index: int) -> None:
        image = source.load(index)
        layout[index, 1:] = image.height, image.width

    _for_each(source, read)
    ends = (_values_of(source)[0] * layout[:, 1] * layout[:, 2]).cumsum()
    layout[1:, 0] = ends[:-1]
    return layout, max(1, int(ends[-1]))


def _decode_all(source: ImageSource, layout: np.ndarray, pixels: np.ndarray) -> None:
    """Decode every image into its place; the height of those that turn out to be broken becomes 0."""

    def decode(index: int) -> None:
        start, height, width = layout[index].tolist()
        layout[index, 1] = 0
        decoded = source.load(index).decode()
        if decoded.shape[:2] == (height, width):
            pixels[start : start + decoded.size] = decoded.reshape(-1)
            layout[index, 1] = height

    _for_each(source, decode)


def _for_each(source: ImageSource, process: Callable[[int], None]) -> None:
    """``process`` every index on all cores, passing over images that cannot be read."""

    def guarded(index: int) -> None:
        with contextlib.suppress(ImageError):  # reported when the image is asked for
            process(index)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, len(source), 4096):  # in portions: a million waiting tasks would fill the memory
            list(pool.map(guarded, range(start, min(start + 4096, len(source)))))


def _check_fits(size: int, available: int, what: str, where: str) -> None:
    if size > available:
        raise ValueError(
            f"{where}, take {size / 2**30:.1f} GiB when decoded, more than the {available / 2**30:.1f} GiB of {what}"
        )


def _free_memory() -> int:
    """Bytes that this process may take: its share of what is free, within the limit of its control group."""
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if math.isfinite(limit := container_limit()):
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return int(MEMORY_SHARE * free / int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _fingerprint(source: ImageSource) -> str:
    """Name of the cache file: a hash of the names, sizes and modification times of all images.

    Those of a zip file stand for the images in it.

    Raises:
        ValueError: If there are no files that could tell whether images have changed.
    """
    digest = hashlib.sha256(b"RGB uint8" if source.channels is None else repr(source.channels).encode())
    stamps = set()
    for index in range(len(source)):
        path = source.path(index)
        try:
            status = os.stat(path if (end := path.rfind(".zip/")) < 0 else path[: end + 4])
            stamp = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            stamp = "unreadable"
        stamps.add(stamp)
        digest.update(os.fsencode(f"{path}\0{stamp}\n"))
    if stamps == {"unreadable"}:
        raise ValueError(
            f"--cache FOLDER: images of {source.name} are no files, so that their changes would go unseen; take "
            "--cache memory"
        )
    return digest.hexdigest()[:16]
