"""PNG files that explain themselves: images at fixed places of a sheet, curves of a log, coloured maps."""

import contextlib
import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared.images.channels import read_values
from shared.images.decode import ImageError
from shared.images.loading import EvalTransform, centre_of_a_strip
from shared.images.sources import FileSource, ImageSource

DPI = 100
THUMBNAIL_PX = 96
LONGEST_NAME = 255  # of a file, in bytes
INK, FAINT = "#222222", "#9a9a9a"
AGREE, DIFFER = "#2a8f4a", "#c8372d"


def to_pixels(image: Tensor | np.ndarray) -> np.ndarray:
    """RGB pixels (H, W, 3), uint8, of a uint8 tensor (3, H, W) or (1, H, W), or of such an array.

    Of floats with any channels the first three, or the first one, each from its 0.5th to its 99.5th percentile.
    """
    if isinstance(image, Tensor):
        image = image.detach().cpu().permute(1, 2, 0).numpy()
    if image.dtype.kind == "f" and image.ndim == 3:
        image = image[..., : 3 if image.shape[2] >= 3 else 1]
        low, high = np.percentile(image, (0.5, 99.5), axis=(0, 1))
        image = (255 * ((image - low) / np.maximum(high - low, 1e-6)).clip(0, 1)).round().astype(np.uint8)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"expected a uint8 image with 1 or 3 channels, got {image.dtype} of shape {image.shape}")
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


def normalised_pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """RGB pixels (H, W, 3), uint8, of a normalised image (C, H, W); one channel uses the averages of mean and std.

    Those of other numbers of channels are shown as :func:`to_pixels` shows them.
    """
    if len(image) not in (1, 3):
        return to_pixels(image)
    mean, std = torch.tensor(mean), torch.tensor(std)
    if len(image) == 1:
        mean, std = mean.mean(dim=0, keepdim=True), std.mean(dim=0, keepdim=True)
    pixels = image.cpu() * std[:, None, None] + mean[:, None, None]
    return to_pixels((255 * pixels).round().clamp(0, 255).byte())


def thumbnail(source: ImageSource, index: int) -> np.ndarray:
    """The centre square of an image at ``THUMBNAIL_PX``, grey where it cannot be read.

    Pixels of very small images stay visible as squares.
    """
    try:
        if (values := _values_of_file(source, index)) is not None:
            return _centre_square(values)
        image = source.load(index)
        shrink = min(image.height, image.width) // THUMBNAIL_PX
        pixels = image.decode(next(reduction for reduction in (8, 4, 2, 1) if reduction <= max(shrink, 1)))
    except ImageError:
        return np.full((THUMBNAIL_PX, THUMBNAIL_PX, 3), 128, dtype=np.uint8)
    return _centre_square(pixels)


def _centre_square(pixels: np.ndarray) -> np.ndarray:
    magnified = magnify(centre_of_a_strip(pixels), THUMBNAIL_PX)
    return to_pixels(EvalTransform(THUMBNAIL_PX, THUMBNAIL_PX)(magnified))


def _values_of_file(source: ImageSource, index: int) -> np.ndarray | None:
    """Values of a file that is no RGB of 8 bits, of a source that does not know it, as one of a table of features.

    Where Pillow has colours for them, those.
    """
    if isinstance(source, FileSource) and source.channels is None:
        with contextlib.suppress(ImageError):
            if source.path(index).lower().endswith((".tif", ".tiff", ".npy")):
                values = read_values(source.path(index), None)
                if values.dtype != np.uint8:
                    return values.astype(np.float32)
                if values.shape[2] not in (1, 3):
                    with contextlib.suppress(ImageError):  # transparency, CMYK
                        return source.load(index).decode()
                    return values.astype(np.float32)
    return None


def write_png(path: str | Path, pixels: np.ndarray) -> Path:
    """Write RGB pixels (H, W, 3), uint8, and return the path."""
    Image.fromarray(pixels).save(path, format="PNG")
    return Path(path)


def link_images(source: ImageSource, groups: Mapping[str, Iterable[int]], folder: Path) -> Path:
    """Write a folder for each group that has images, with links to them, or the images where there are no files.

    Args:
        groups: Indices of images by the name of the folder, which may have parts.
    """
    for name, images in groups.items():
        for i in images:
            (folder / name).mkdir(parents=True, exist_ok=True)
            if isinstance(source, FileSource):
                target = os.path.abspath(source.path(i))
                stem, suffix = os.path.splitext(os.path.basename(target))
                short = os.fsdecode(os.fsencode(stem)[: LONGEST_NAME - len(f"{i:06}_") - len(os.fsencode(suffix))])
                os.symlink(target, folder / name / f"{i:06}_{short}{suffix}")
            else:
                write_png(folder / name / f"{i:06}.png", to_pixels(source.load(i).decode()))
    return folder


@functools.cache
def _characters(font_file: str) -> frozenset[int]:
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_file).get_charmap())


@functools.cache
def _font_of(character: str) -> str | None:
    """The first font of this machine, Matplotlib's own before all others, that can draw the character."""
    from matplotlib import font_manager

    fonts = sorted(font_manager.fontManager.ttflist, key=lambda font: (font.name != "DejaVu Sans", font.name))
    with_glyphs = (font for font in fonts if not re.search("Last ?Resort|Adobe Blank", font.name))  # of any code: boxes
    return next((font.name for font in with_glyphs if ord(character) in _characters(font.fname)), None)


def text(content: str) -> dict:
    """Arguments of Matplotlib for a text with names of files and classes, which may hold anything.

    A dollar is no formula. Characters that Matplotlib's font lacks come from another font of the machine; where none
    has them, their codes are drawn, and a sign for every byte that is no UTF-8.
    """
    content = content.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    fonts = {character: _font_of(character) for character in sorted(set(content) - {"\n"})}
    shown = "".join(c if c == "\n" or fonts[c] else f"\\u{ord(c):04x}" for c in content)
    family = dict.fromkeys(["DejaVu Sans", *filter(None, fonts.values())])
    return {"s": shown, "family": list(family), "parse_math": False}


def magnify(pixels: np.ndarray, least_px: int) -> np.ndarray:
    """Repeat pixels, by a whole factor, until the short side has at least ``least_px``; larger images stay."""
    factor = -(-least_px // min(pixels.shape[:2]))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def colorize(values: np.ndarray, colormap: str = "viridis") -> np.ndarray:
    """Colours (H, W, 3), uint8, of a map (H, W), from its smallest to its largest value."""
    import matplotlib

    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return matplotlib.colormaps[colormap](scaled, bytes=True)[..., :3]


@dataclass
class Tile:
    """An image on a sheet.

    Attributes:
        pixels: RGB, uint8, shape (H, W, 3).
        title: Text above it.
        caption: Text below it.
        frame: Colour of a frame, or None.
    """

    pixels: np.ndarray
    title: str = ""
    caption: str = ""
    frame: str | None = None


def save_sheet(
    rows: Sequence[Sequence[Tile]], path: str | Path, heading: str, heights_in: Sequence[float] | None = None
) -> Path:
    """Write rows of images with texts above and below each.

    Args:
        rows: Images from left to right; rows may differ in length.
        heading: First line of the sheet; further lines become smaller text.
        heights_in: Height of the images of each row in inches; 1.2 by default.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    heights = list(heights_in) if heights_in else [1.2] * len(rows)
    gap, margin, line = 0.12, 0.3, 0.2
    above = [line if any(tile.title for tile in row) else 0 for row in rows]
    below = [line if any(tile.caption for tile in row) else 0 for row in rows]
    widths = [
        [height * tile.pixels.shape[1] / tile.pixels.shape[0] for tile in row]
        for row, height in zip(rows, heights, strict=True)
    ]
    title, *notes = heading.split("\n")
    small = {"fontsize": 8.5, "color": INK, "ha": "center"}
    title_in = 0.45 + 0.22 * len(notes)
    text_in = max(0.105 * len(title), *(0.075 * len(note) for note in notes), 0)
    width = 2 * margin + max(*(sum(row) + gap * (len(row) - 1) for row in widths), text_in)
    height = 2 * margin + title_in + sum(heights) + sum(above) + sum(below) + gap * (len(rows) - 1)

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))  # one for all tiles, in inches: those of each tile's own would take seconds
    axes.set_axis_off()
    y = height - margin
    left = margin / width
    figure.text(left, y / height, fontsize=13, weight="bold", color=INK, va="top", **text(title))
    for i, note in enumerate(notes):
        note_y = (y - 0.3 - 0.22 * i) / height
        figure.text(left, note_y, fontsize=9.5, color="#555555", va="top", **text(note))
    y -= title_in
    for row, row_widths, tile_height, over, under in zip(rows, widths, heights, above, below, strict=True):
        y -= over + tile_height
        x = margin
        for tile, tile_width in zip(row, row_widths, strict=True):
            smooth = len(tile.pixels) > tile_height * DPI  # shrink without aliasing, but show single pixels as squares
            place = (x, x + tile_width, y, y + tile_height)
            axes.imshow(tile.pixels, extent=place, interpolation="antialiased" if smooth else "nearest", aspect="auto")
            if tile.frame is not None:
                frame = Rectangle((x, y), tile_width, tile_height, fill=False, color=tile.frame, linewidth=3)
                axes.add_patch(frame)
            middle = (x + tile_width / 2) / width
            above_tile, below_tile = (y + tile_height + 0.042) / height, (y - 0.028) / height
            figure.text(middle, above_tile, va="baseline", **small, **text(tile.title))
            figure.text(middle, below_tile, va="top", **small, **text(tile.caption))
            x += tile_width + gap
        y -= under + gap
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    figure.savefig(path)
    return Path(path)
