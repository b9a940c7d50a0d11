"""PNG files that explain themselves: images at fixed places of a sheet, curves of a log, coloured maps."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

DPI = 100
INK, FAINT = "#222222", "#9a9a9a"
AGREE, DIFFER = "#2a8f4a", "#c8372d"


def to_pixels(image: Tensor | np.ndarray) -> np.ndarray:
    """RGB pixels (H, W, 3), uint8, of a uint8 tensor (3, H, W) or (1, H, W), or of such an array."""
    if isinstance(image, Tensor):
        image = image.detach().cpu().permute(1, 2, 0).numpy()
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"expected a uint8 image with 1 or 3 channels, got {image.dtype} of shape {image.shape}")
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


def write_png(path: str | Path, pixels: np.ndarray) -> Path:
    """Write RGB pixels (H, W, 3), uint8, and return the path."""
    Image.fromarray(pixels).save(path, format="PNG")
    return Path(path)


@functools.cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """Matplotlib's own font and those of this machine that have the letters of most scripts; their characters."""
    from matplotlib import font_manager

    there = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    wanted = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Arial Unicode MS")
    names = [name for name in wanted if name in there]
    return names, frozenset(c for name in names for c in font_manager.get_font(there[name]).get_charmap())


def text_style() -> dict:
    """How Matplotlib sets names of files and classes: letter by letter, a dollar is no formula."""
    return {"parse_math": False, "family": _fonts()[0]}


def printable(text: str) -> str:
    """A name with the codes of characters that no font has, and a sign for every byte that is no UTF-8."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(c if c == "\n" or ord(c) in _fonts()[1] else f"\\u{ord(c):04x}" for c in text)


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
    title, *notes = printable(heading).split("\n")
    style = text_style()
    small = {"fontsize": 8.5, "color": INK, "ha": "center", **style}
    title_in = 0.45 + 0.22 * len(notes)
    text_in = max(0.105 * len(title), *(0.075 * len(note) for note in notes), 0)
    width = 2 * margin + max(*(sum(row) + gap * (len(row) - 1) for row in widths), text_in)
    height = 2 * margin + title_in + sum(heights) + sum(above) + sum(below) + gap * (len(rows) - 1)

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))  # one for all tiles, in inches: those of each tile's own would take seconds
    axes.set_axis_off()
    y = height - margin
    figure.text(margin / width, y / height, title, fontsize=13, weight="bold", color=INK, va="top", **style)
    for i, note in enumerate(notes):
        figure.text(
            margin / width, (y - 0.3 - 0.22 * i) / height, note, fontsize=9.5, color="#555555", va="top", **style
        )
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
            figure.text(middle, above_tile, printable(tile.title), va="baseline", **small)
            figure.text(middle, below_tile, printable(tile.caption), va="top", **small)
            x += tile_width + gap
        y -= under + gap
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    figure.savefig(path)
    return Path(path)


def save_neighbours(
    query_images: Sequence[Tensor | np.ndarray],
    neighbour_images: Sequence[Sequence[Tensor | np.ndarray]],
    path: str | Path,
    query_labels: Sequence | None = None,
    neighbour_labels: Sequence[Sequence] | None = None,
    similarities: Sequence[Sequence[float]] | None = None,
) -> Path:
    """Queries at the left and their nearest neighbours, nearest first, one row each.

    Args:
        query_images: Q uint8 images (3, H, W).
        neighbour_images: Q x k uint8 images.
        path: PNG file to write.
        query_labels: Q class names or numbers.
        neighbour_labels: Q x k of them; frames tell whether they agree with the query's.
        similarities: Q x k cosine similarities.
    """
    rows, agreeing, total = [], 0, 0
    for q, (query, neighbours) in enumerate(zip(query_images, neighbour_images, strict=True)):
        row = [Tile(to_pixels(query), "query" if q == 0 else "", _caption(query_labels, q))]
        for i, neighbour in enumerate(neighbours):
            frame = None
            caption = _caption(neighbour_labels[q] if neighbour_labels is not None else None, i)
            if query_labels is not None and neighbour_labels is not None:
                agrees = _plain(neighbour_labels[q][i]) == _plain(query_labels[q])
                frame = AGREE if agrees else DIFFER
                agreeing, total = agreeing + agrees, total + 1
            if similarities is not None:
                caption = f"{caption}  {float(similarities[q][i]):.2f}".strip()
            row.append(Tile(to_pixels(neighbour), f"neighbour {i + 1}" if q == 0 else "", caption, frame))
        rows.append(row)
    notes = []
    if total:
        notes.append(f"{agreeing} of {total} neighbours are of the query's class: green frame yes, red no.")
    if similarities is not None:
        notes.append("The decimal number is the cosine similarity.")
    return save_sheet(rows, path, "\n".join(["Nearest neighbours in feature space", *notes]))


def _plain(label):
    return label.item() if hasattr(label, "item") else label


def _caption(labels: Sequence | None, index: int) -> str:
    return "" if labels is None else str(_plain(labels[index]))
