"""Images of other channels than red, green and blue, of 8 or 16 bits or floats: ``--in_chans N``, ``--value_range``.

They are read so where ``--in_chans`` is neither 3 nor 1 (the luminance of colours), or ``--value_range`` is given:
TIFF files (of tifffile), ``.npy`` files, what Pillow reads, and arrays of an own Dataset, of uint8, uint16, int16 or
floats. Channels come last or first, (H, W, N) or (N, H, W); pages of a TIFF file may be the channels. A value becomes

    x = clip((value - low) / (high - low), 0, 1),    z = (x - mean) / std

with low and high of ``--value_range``: two numbers for all channels, or two percentiles of each one (``0.1% 99.9%``,
the default). Percentiles, mean and std of every channel are measured at most once, before a training, of 256 images
evenly spaced over it, and stay in the checkpoint (``args["channels"]``): for a run that is resumed, for evaluations
and features.

From here on images are float32 and normalised; who meets such pixels normalises no more. What steps of a view mean:

==========================  ===========================================================================================
crop, resize, flip, blur    the same, of every channel
brightness                  all channels are multiplied by one factor: x becomes clip(f x, 0, 1)
contrast                    each channel moves by one factor from its own mean m in the view: clip(m + f (x - m), 0, 1)
saturation, hue, grey       none: they are defined for colours
solarise, equalise          none
RandAugment, colour jitter  none in supervised training, whose crops, flips, Mixup, CutMix and erasing stay
==========================  ===========================================================================================

Every step is drawn as for colours, applied or not. Pictures show the first three channels as colours, or the first one
in grey where there are fewer, each stretched between its own percentiles.
"""

import argparse
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from PIL import ImageOps

from shared import distributed

from .decode import MAX_PIXELS, WHITE_IS_ZERO, DecodedImage, ImageError, open_with_pil, read_file, upright

MOST = 16  # channels
DTYPES = ("uint8", "uint16", "int16", "float16", "float32", "float64")
MODES = ("L", "LA", "RGB", "RGBA", "I", "I;16", "I;16B", "F")  # of Pillow
PALETTE = 3  # photometric interpretation of a TIFF file
DEFAULT_RANGE = ("0.1%", "99.9%")
SAMPLE, PIXELS = 256, 4096  # images that are measured, and pixels of each
LEAST_SHARE = 0.1  # of the range


@dataclass(frozen=True)
class Channels:
    """How the values of N channels enter a network, see above.

    Attributes:
        low, high: Of each channel; none: values stay as they are, to be measured.
        mean, std: Of each channel, of values that the range has brought to [0, 1].
    """

    number: int
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    def image(self, values: np.ndarray) -> DecodedImage:
        """Values (H, W, N) as an image of normalised float32 pixels."""
        if not len(self.low):
            return DecodedImage(values)
        low, high, mean, std = (np.asarray(part, np.float32) for part in (self.low, self.high, self.mean, self.std))
        scale = 1 / ((high - low) * std)
        pixels = np.clip(values.astype(np.float32), low, high)
        pixels -= low
        pixels *= scale
        pixels -= mean / std
        return DecodedImage(np.ascontiguousarray(pixels))

    @cached_property
    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Normalised pixels of the ends of the range, each (N,)."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return -mean / std, (1 - mean) / std


# --- Files ------------------------------------------------------------------------------------------------------------


def read_values(path: str | os.PathLike, number: int | None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Values of a file as they are, (H, W, N).

    Args:
        number: N; None: whatever it has, at most 16.

    Raises:
        ImageError: If the file cannot be read, or holds something else.
    """
    data, name = read_file(path), str(path)
    most, orientation = (number or MOST) * max_pixels, 1
    try:
        if data[:6] == b"\x93NUMPY":
            values = np.load(io.BytesIO(data), allow_pickle=False)
        elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            values, orientation = _read_tiff(data, most)
        else:
            values = _read_with_pil(data, name, max_pixels)
    except ImageError as error:
        raise ImageError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from error
    except Exception as error:  # as Pillow, tifffile raises nearly anything for a broken file
        raise ImageError(f"{name}: {error or type(error).__name__}") from error
    _check_size(values.shape, most)
    return upright(as_channels(values, number, name), orientation)


def as_channels(values: np.ndarray, number: int | None, name: str) -> np.ndarray:
    """Values (H, W, N) of an array of one of the shapes above; ``ImageError`` with its name where it has another."""
    if values.dtype.name not in DTYPES:
        raise ImageError(f"{name}: pixels of {values.dtype}; --in_chans takes {', '.join(DTYPES)}")
    fitting = (number,) if number else range(1, MOST + 1)
    found = values.squeeze() if values.ndim > 3 else values
    if found.ndim == 2:
        found = found[..., None]
    elif found.ndim == 3 and found.shape[2] not in fitting and found.shape[0] in fitting:
        found = np.moveaxis(found, 0, 2)
    if found.ndim != 3 or found.shape[2] not in fitting or not found.size:
        n = number or "N"
        raise ImageError(f"{name}: shape {values.shape} is not that of --in_chans {n}, (H, W, {n}) or ({n}, H, W)")
    if found.dtype.kind == "f" and not (finite := np.isfinite(found).all(axis=(0, 1))).all():
        raise ImageError(f"{name}: NaN or infinity in channel {int(np.argmin(finite)) + 1} of {found.shape[2]}")
    return found


def _read_tiff(data: bytes, most: int) -> tuple[np.ndarray, int]:
    """Values, and how they have to be turned."""
    try:
        import tifffile
    except ImportError as error:
        raise ImageError("TIFF files with --in_chans need tifffile (pip install -e '.[channels]')") from error
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if len(file.series) != 1:
            raise ImageError(f"{len(file.series)} images of different shapes in one file")
        if file.pages[0].photometric == PALETTE:
            raise ImageError("a palette, whose numbers are no intensities; save its colours, or one channel")
        _check_size(file.series[0].shape, most)
        values, orientation = file.series[0].asarray(), file.pages[0].tags.get("Orientation")
        if file.pages[0].photometric == WHITE_IS_ZERO:
            if values.dtype.kind != "u":
                raise ImageError(f"0 is white, which is not defined for {values.dtype}")
            values = np.iinfo(values.dtype).max - values
        return values, 1 if orientation is None else orientation.value


def _read_with_pil(data: bytes, name: str, max_pixels: int) -> np.ndarray:
    image = open_with_pil(data, name)
    _check_size(image.size, max_pixels)
    if image.mode not in MODES:
        raise ImageError(f"pixels of Pillow's mode {image.mode}; --in_chans takes {', '.join(MODES)}")
    if image.format == "PNG" and data[24] == 16 and len(image.getbands()) > 2:  # of which Pillow keeps 8 bits
        import cv2  # which every script that has flags would load

        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        return values[..., [2, 1, 0, 3][: values.shape[2]]]
    values = np.asarray(ImageOps.exif_transpose(image))
    return values.astype(np.uint16) if image.mode == "I" and values.min() >= 0 and values.max() < 2**16 else values


def _check_size(shape: Sequence[int], most: int) -> None:
    if math.prod(shape) > most:
        raise ImageError(f"{' x '.join(map(str, shape))} values are more than --max_megapixels allows")


# --- Range, mean and standard deviation -------------------------------------------------------------------------------


def add_channel_flags(add: Callable) -> None:
    """``--in_chans`` and ``--value_range``, with the ``add_argument`` of a group."""
    number = "channels of the images, 1 to 16; 3: RGB, 1: its luminance, unless --value_range is given"
    add("--in_chans", type=int, default=3, choices=range(1, MOST + 1), metavar="N", help=number)
    bounds = "lowest and highest value of channels that are no RGB, as numbers or percentiles; None: 0.1%% 99.9%%"
    add("--value_range", nargs=2, type=bound, default=None, metavar=("LOW", "HIGH"), help=bounds)


def bound(text: str) -> str:
    """A number, or a percentile such as ``0.1%``."""
    number = float(text.removesuffix("%"))
    if not math.isfinite(number) or (text.endswith("%") and not 0 <= number <= 100):
        raise ValueError(text)
    return text


def are_asked_for(args: argparse.Namespace) -> bool:
    """Whether images are read as this module reads them."""
    stated = getattr(args, "channels", None) or getattr(args, "value_range", None)
    return bool(stated) or getattr(args, "in_chans", 3) not in (1, 3)


def measure(source, value_range: Sequence[str] | None) -> dict:
    """Range, mean and standard deviation of every channel, as the arguments of :class:`Channels`.

    Args:
        source: Images whose values are as they are in the files.

    Raises:
        ValueError: If no image can be read (the error of the first one), or a channel has a single value.
    """
    number, bounds = source.channels.number, value_range or DEFAULT_RANGE
    given = f"--value_range {' '.join(bounds)}"
    values, errors = [], []
    for index in np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).astype(int).tolist():
        try:
            pixels = source.load(index).decode().reshape(-1, number)
        except ImageError as error:
            errors.append(error)
            continue
        values.append(pixels[:: len(pixels) // PIXELS | 1].astype(np.float32))  # odd: not always the same columns
    if not values:
        raise errors[0]
    values = np.concatenate(values)
    used = np.percentile(values, [float(text[:-1]) for text in DEFAULT_RANGE], axis=0)
    low, high = (
        np.percentile(values, float(text[:-1]), axis=0) if text.endswith("%") else np.full(number, float(text))
        for text in bounds
    )
    if (low >= high).any():
        channel = int(np.argmax(low >= high))
        raise ValueError(
            f"{given} is {low[channel]:g} to {high[channel]:g} in channel {channel + 1} of {source.name}: no range"
        )
    scaled = np.clip((values - low) / (high - low), 0, 1)
    mean, std = scaled.mean(axis=0, dtype=np.float64), scaled.std(axis=0, dtype=np.float64)
    if not std.all():
        raise ValueError(f"{given}: channel {int(np.argmin(std)) + 1} of {source.name} has a single value in it")
    share = np.ptp(used, axis=0) / (high - low)
    ranges = ", ".join(f"{a:g} to {b:g}" for a, b in zip(low, high, strict=True))
    distributed.print_once(f"{number} channels, {given} of {source.name}: {ranges}")
    if share.min() < LEAST_SHARE:
        channel = int(share.argmin())
        distributed.print_once(
            f"WARNING: the images use {100 * share[channel]:.2g} % of {given} in channel {channel + 1}, "
            f"{used[0, channel]:g} to {used[1, channel]:g}; --value_range {' '.join(DEFAULT_RANGE)} fits itself to them"
        )
    return asdict(Channels(number, *(part.tolist() for part in (low, high, mean, std))))


def keep_channels(args: argparse.Namespace, trained_with: Mapping) -> None:
    """Give the flags of a run that goes on what was measured when it began.

    Raises:
        ValueError: If it began with another ``--value_range``.
    """
    if trained_with.get("channels"):
        now, then = (" ".join(bounds or DEFAULT_RANGE) for bounds in (args.value_range, trained_with["value_range"]))
        if now != then:
            raise ValueError(f"--value_range {now} does not fit the checkpoint in --output_dir, which has {then}")
        args.channels = trained_with["channels"]
