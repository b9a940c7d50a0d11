"""Random views of an image: what is drawn, apart from how it is applied.

Parameters are drawn in the order in which torchvision's transforms draw them, from the same streams of random numbers,
so a view can be repeated with ``torchvision.transforms`` value by value. ``apply_pil`` is that chain; ``apply_fast``
computes the same on uint8 with torch's resize and OpenCV, several times faster.
"""

import math
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbering of the jitter's steps


@dataclass(frozen=True)
class ViewRecipe:
    """How one view of an image is made. A probability of 0 leaves a step out, and then nothing is drawn for it.

    Attributes:
        size_px: Side of the square view.
        scale: Range of the crop's share of the image area.
        ratio: Range of the crop's width over height.
        flip_p: Probability of a horizontal flip.
        jitter: Strengths of brightness, contrast, saturation and hue; as in ``ColorJitter``.
        jitter_p: Probability of the colour jitter.
        grey_p: Probability of losing the colours.
        blur_p: Probability of a Gaussian blur.
        blur_radius: Range of its standard deviation in pixels of the view.
        solarize_p: Probability of inverting the pixels from ``solarize_threshold`` on.
        solarize_threshold: A grey level, or the range from which one is drawn.
        equalize_p: Probability of spreading the grey levels of each channel evenly.
        interpolation: ``bicubic`` or ``bilinear``, antialiased.
    """

    size_px: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.0
    grey_p: float = 0.0
    blur_p: float = 0.0
    blur_radius: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0
    solarize_threshold: int | tuple[float, float] = 128
    equalize_p: float = 0.0
    interpolation: str = "bicubic"

    def __post_init__(self):
        if self.size_px < 1:
            raise ValueError(f"size_px {self.size_px} is less than 1")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {self.scale} is no range of positive shares of the image area")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation {self.interpolation!r} is neither bicubic nor bilinear")


class ViewParams(NamedTuple):
    """One draw of a :class:`ViewRecipe` for an image of known size.

    Attributes:
        top, left, height, width: The crop in pixels of the image.
        jitter: (step, factor) in the order of application, steps numbered as ``BRIGHTNESS`` ... ``HUE``.
        blur_radius: Standard deviation in pixels; 0 for no blur.
        solarize_threshold: The grey level; None: the recipe's.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool
    jitter: tuple[tuple[int, float], ...]
    grey: bool
    blur_radius: float
    solarize: bool
    solarize_threshold: int | None = None
    equalize: bool = False


class DrawStreams:
    """The two sources of randomness of a torchvision chain: torch's CPU generator and python's ``random``.

    Yields what ``torch.rand(1)``, ``torch.empty(1).uniform_``, ``torch.randint`` and ``torch.randperm`` return after
    ``torch.manual_seed(torch_seed)`` at a tenth of the cost: torch and numpy's ``RandomState`` run the same Mersenne
    Twister, of whose words torch makes a float32 from the low 24 bits.
    """

    def __init__(self, torch_seed: int, python_seed: int):
        self._word = _twister_words(torch_seed % 2**32).__next__
        self.python = random.Random(python_seed)

    def rand(self) -> float:
        return (self._word() & 0xFFFFFF) * 2.0**-24

    def uniform(self, low: float, high: float) -> float:
        low, span = _float32_range(low, high)
        return _float32(self.rand() * span + low)  # one rounding: torch's kernel is a fused multiply-add

    def randint(self, high: int) -> int:
        return self._word() % high

    def permutation(self, n: int) -> list[int]:
        order = list(range(n))
        for i in range(n - 1):
            j = i + self._word() % (n - i)
            order[i], order[j] = order[j], order[i]
        return order


_TWISTER = np.random.RandomState(0)  # making one costs a hundred times as much as seeding it again


def _twister_words(seed: int) -> Iterator[int]:
    """The 32-bit words of a Mersenne Twister, without end."""
    done, count = 0, 192  # ten views take about 150
    while True:
        _TWISTER.seed(seed)
        yield from np.frombuffer(_TWISTER.bytes(4 * count), dtype="<u4")[done:].tolist()
        done, count = count, 4 * count


_FLOAT32 = struct.Struct("f")


def _float32(value: float) -> float:
    return _FLOAT32.unpack(_FLOAT32.pack(value))[0]


@lru_cache(maxsize=256)
def _float32_range(low: float, high: float) -> tuple[float, float]:
    return _float32(low), _float32(_float32(high) - _float32(low))


@lru_cache(maxsize=16)
def _log_range(ratio: tuple[float, float]) -> tuple[float, float]:
    low, high = torch.log(torch.tensor(ratio)).tolist()
    return low, high


def draw_view(recipe: ViewRecipe, height: int, width: int, streams: DrawStreams) -> ViewParams:
    """Draw the parameters of one view of an image of ``height`` x ``width`` pixels.

    Order: crop, flip, jitter, grey from torch's stream; blur, solarise, equalise from python's.
    """
    top, left, crop_height, crop_width = _draw_crop(recipe, height, width, streams)
    flip = recipe.flip_p > 0 and streams.rand() < recipe.flip_p
    jitter = ()
    if recipe.jitter_p > 0 and streams.rand() <= recipe.jitter_p:
        jitter = _draw_jitter(recipe.jitter, streams)
    grey = recipe.grey_p > 0 and streams.rand() < recipe.grey_p
    blur_radius = 0.0
    if recipe.blur_p > 0 and streams.python.random() <= recipe.blur_p:
        blur_radius = streams.python.uniform(*recipe.blur_radius)
    solarize = recipe.solarize_p > 0 and streams.python.random() < recipe.solarize_p
    threshold = recipe.solarize_threshold
    if solarize and isinstance(threshold, tuple):
        threshold = math.ceil(streams.python.uniform(*threshold))  # pixels are whole: those from the next level on
    equalize = recipe.equalize_p > 0 and streams.python.random() < recipe.equalize_p
    threshold = threshold if solarize else None
    return ViewParams(
        top, left, crop_height, crop_width, flip, jitter, grey, blur_radius, solarize, threshold, equalize
    )


def _draw_crop(recipe: ViewRecipe, height: int, width: int, streams: DrawStreams) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop; after ten misses the largest centred one of allowed ratio."""
    log_low, log_high = _log_range(recipe.ratio)
    for _ in range(10):
        area = height * width * streams.uniform(*recipe.scale)
        ratio = _float32(math.exp(streams.uniform(log_low, log_high)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = streams.randint(height - crop_height + 1)
            return top, streams.randint(width - crop_width + 1), crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < min(recipe.ratio):
        crop_height = round(width / min(recipe.ratio))
    elif width / height > max(recipe.ratio):
        crop_width = round(height * max(recipe.ratio))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _draw_jitter(strengths: tuple[float, ...], streams: DrawStreams) -> tuple[tuple[int, float], ...]:
    order = streams.permutation(4)
    factors: dict[int, float] = {}
    for step, strength in enumerate(strengths):
        if strength > 0:
            low, high = (-strength, strength) if step == HUE else (max(0.0, 1 - strength), 1 + strength)
            factors[step] = streams.uniform(low, high)
    return tuple((step, factors[step]) for step in order if step in factors)


# ------------------------------------------------------------------------------------------------------ with Pillow


def apply_pil(pixels: np.ndarray, view: ViewParams, recipe: ViewRecipe, out: np.ndarray) -> None:
    """Make a view with the operations of torchvision's PIL chain.

    Args:
        pixels: RGB, uint8, shape (H, W, 3); the full image.
        out: Receives the view: uint8, shape (size_px, size_px, 3), or 1 channel for the luminance.
    """
    from torchvision.transforms import InterpolationMode  # here: it takes a second, and few runs use this chain
    from torchvision.transforms import functional as TF

    jitter = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    image = TF.resized_crop(
        Image.fromarray(pixels),
        view.top,
        view.left,
        view.height,
        view.width,
        [recipe.size_px, recipe.size_px],
        InterpolationMode(recipe.interpolation),
    )
    if view.flip:
        image = TF.hflip(image)
    for step, factor in view.jitter:
        image = jitter[step](image, factor)
    if view.grey:
        image = TF.to_grayscale(image, num_output_channels=3)
    if view.blur_radius > 0:
        image = image.filter(ImageFilter.GaussianBlur(view.blur_radius))
    if view.solarize:
        image = ImageOps.solarize(image, _threshold(view, recipe))
    if view.equalize:
        image = ImageOps.equalize(image)
    out[:] = np.asarray(image) if out.shape[-1] == 3 else np.asarray(image.convert("L"))[..., None]


# ------------------------------------------------------------------------------------------- channels that are no RGB


def without_colours(view: ViewParams) -> ViewParams:
    """A draw without the steps that :mod:`shared.images.channels` leaves out."""
    jitter = tuple((step, factor) for step, factor in view.jitter if step in (BRIGHTNESS, CONTRAST))
    return view._replace(jitter=jitter, grey=False, solarize=False, equalize=False)


def apply_channels(
    pixels: np.ndarray, view: ViewParams, recipe: ViewRecipe, out: np.ndarray, limits: tuple[np.ndarray, np.ndarray]
) -> None:
    """Make a view of normalised channels with the steps that :mod:`shared.images.channels` defines.

    Args:
        pixels: float32, shape (H, W, C); the full image.
        out: Receives the view: float32, shape (size_px, size_px, C).
        limits: Lowest and highest pixel of each channel, that is x = 0 and x = 1.
    """
    image = np.clip(_resized_crop(pixels, view, recipe, (1.0, 1.0)), *limits)
    for step, factor in view.jitter:
        fixed = limits[0] if step == BRIGHTNESS else image.mean(axis=(0, 1))
        image = np.clip(fixed + np.float32(factor) * (image - fixed), *limits)
    if view.blur_radius > 0:
        image = _blur(image, view.blur_radius).reshape(out.shape)  # OpenCV drops the axis of a single channel
    out[:] = image[:, ::-1] if view.flip else image


# ---------------------------------------------------------------------------------------------------------- fast


def apply_fast(
    pixels: np.ndarray, view: ViewParams, recipe: ViewRecipe, out: np.ndarray, scale: tuple[float, float] = (1.0, 1.0)
) -> None:
    """Make a view on uint8 with torch's antialiased resize and OpenCV; like :func:`apply_pil` up to rounding.

    Args:
        pixels: RGB, uint8, shape (H, W, 3); the image, possibly decoded at a smaller size.
        out: Receives the view: uint8, C-contiguous, shape (size_px, size_px, 3), or 1 channel for the luminance.
        scale: Rows and columns of ``pixels`` per row and column of the full image.
    """
    image = _resized_crop(pixels, view, recipe, scale)
    for step, factor in view.jitter:
        image = _FAST_JITTER[step](image, factor)
    # the flip and the channels can wait: blur one plane instead of three, but solarise and equalise colours
    if view.grey or (out.shape[-1] == 1 and not (view.solarize or view.equalize)):
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if view.blur_radius > 0:
        image = _blur(image, view.blur_radius)
    _finish(image, view, recipe, out)


def _resized_crop(pixels: np.ndarray, view: ViewParams, recipe: ViewRecipe, scale: tuple[float, float]) -> np.ndarray:
    top, left = round(view.top * scale[0]), round(view.left * scale[1])
    bottom, right = round((view.top + view.height) * scale[0]), round((view.left + view.width) * scale[1])
    # A contiguous channels-last copy of the crop lets torch take its fastest path; the copy costs a twentieth of it.
    crop = torch.from_numpy(np.ascontiguousarray(pixels[None, top:bottom, left:right])).permute(0, 3, 1, 2)
    size = (recipe.size_px, recipe.size_px)
    resized = F.interpolate(crop, size=size, mode=recipe.interpolation, antialias=True)
    return resized.permute(0, 2, 3, 1).numpy()[0]


# Pillow truncates where OpenCV rounds. Not 0.5, which would turn whole numbers into ties.
_TRUNCATE = -0.498
_LUMINANCE = np.array([0.299, 0.587, 0.114])
_IDENTITY = np.eye(3, 4)
_GREY = np.hstack([np.tile(_LUMINANCE, (3, 1)), np.zeros((3, 1))])
_OFFSET = np.array([[0.0, 0.0, 0.0, _TRUNCATE]] * 3)


def _adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.addWeighted(image, factor, image, 0.0, _TRUNCATE)


def _adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    mean = int(np.dot(cv2.mean(image)[:3], _LUMINANCE) + 0.5)
    return cv2.addWeighted(image, factor, image, 0.0, (1 - factor) * mean + _TRUNCATE)


def _adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.transform(image, factor * _IDENTITY + (1 - factor) * _GREY + _OFFSET)


def _adjust_hue(image: np.ndarray, factor: float) -> np.ndarray:
    shift = int(factor * 255)
    if shift == 0:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv += _hue_row(hsv.shape[1], shift % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, dst=hsv)


@lru_cache(maxsize=1024)
def _hue_row(width: int, shift: int) -> np.ndarray:
    """(shift, 0, 0) for every pixel of a row: adding whole rows is six times faster than a strided channel."""
    row = np.zeros((width, 3), dtype=np.uint8)
    row[:, 0] = shift
    return row


_FAST_JITTER: dict[int, Callable[[np.ndarray, float], np.ndarray]] = {
    BRIGHTNESS: _adjust_brightness,
    CONTRAST: _adjust_contrast,
    SATURATION: _adjust_saturation,
    HUE: _adjust_hue,
}


def _blur(image: np.ndarray, radius: float) -> np.ndarray:
    kernel = _blur_kernel(round(radius, 2))
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


@lru_cache(maxsize=1024)
def _blur_kernel(radius: float) -> np.ndarray:
    """Pillow's Gaussian of standard deviation ``radius``: a box with fractional ends, three times, float64.

    A box of 2 * whole + 1 ones and two ends of weight ``part`` has a third of the variance (Gwosdek et al.,
    "Theoretical foundations of Gaussian convolution by extended box filtering", 2011). Weights are multiples of 1/256
    that sum to 1, because OpenCV rounds them to that without looking at the sum.
    """
    variance = radius * radius / 3
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.ones(2 * whole + 3)
    box[0] = box[-1] = part
    box /= box.sum()
    kernel = np.convolve(np.convolve(box, box), box)
    tail = np.diff(np.rint(256 * kernel[: len(kernel) // 2].cumsum()), prepend=0)  # rounding sums keeps the variance
    tail = np.trim_zeros(tail, "f")
    return np.concatenate([tail, [256 - 2 * tail.sum()], tail[::-1]]) / 256


def _threshold(view: ViewParams, recipe: ViewRecipe) -> int:
    return recipe.solarize_threshold if view.solarize_threshold is None else view.solarize_threshold


@lru_cache(maxsize=256)
def _solarize_table(threshold: int) -> np.ndarray:
    levels = np.arange(256)
    return np.where(levels < threshold, levels, 255 - levels).astype(np.uint8)


def _equalize(image: np.ndarray) -> np.ndarray:
    """What ``ImageOps.equalize`` does to each channel; OpenCV's ``equalizeHist`` maps to other grey levels."""
    channels = [image] if image.ndim == 2 else cv2.split(image)
    channels = [cv2.LUT(channel, _equalize_table(np.bincount(channel.ravel(), minlength=256))) for channel in channels]
    return channels[0] if image.ndim == 2 else cv2.merge(channels)


def _equalize_table(histogram: np.ndarray) -> np.ndarray:
    used = histogram[histogram > 0]
    step = (used.sum() - used[-1]) // 255
    if len(used) <= 1 or step == 0:
        return np.arange(256, dtype=np.uint8)
    below = np.cumsum(histogram) - histogram
    return np.minimum((step // 2 + below) // step, 255).astype(np.uint8)


def _finish(image: np.ndarray, view: ViewParams, recipe: ViewRecipe, out: np.ndarray) -> None:
    """Solarise, equalise, flip, and write to ``out``, in as many channels as it has."""
    if view.solarize:
        image = cv2.LUT(image, _solarize_table(_threshold(view, recipe)))
    if view.equalize:
        image = _equalize(image)
    if image.ndim == 2 and out.shape[-1] == 3:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    elif image.ndim == 3 and out.shape[-1] == 1:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if view.flip:
        cv2.flip(image, 1, dst=out)
    else:
        np.copyto(out, image.reshape(out.shape))
