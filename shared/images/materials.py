"""Generated images with classes and exact masks: an object cut from one of twelve materials, on a grey wall.

    python -m shared.images.materials OUT --size 64        # OUT/train, OUT/val: a folder per material; OUT/masks of val

The class is the material: a pattern and roughly a hue, which two materials share, so that neither colours nor the
statistics of a pattern tell all. Everything else is drawn anew for every image (outline, place and size of the object;
phase, angle and scale of the pattern; brightness, contrast and direction of the light) and is what crops and colour
jitter change too: what a method can learn to ignore, while pixels cannot.
"""

import argparse
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator

from shared.run.files import atomic_file
from shared.run.flags import Parser

NUMBERS = {"train": 1920, "val": 360}
SEEDS = {"train": 2, "val": 3}  # the flags of the demonstrations were chosen on the images of 0 and 1
SIZE_PX = 32
SUPERSAMPLE = 3  # the edges of patterns are sharp: drawn so many times larger, then averaged
VERSION = 1  # of the pixels


# --- Patterns ---------------------------------------------------------------------------------------------------------


def wave(x: np.ndarray) -> np.ndarray:
    """Cosine of period 1."""
    return np.cos(2 * np.pi * x)


def cells(x: np.ndarray, y: np.ndarray, side: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates from -0.5 to 0.5 within the cells of a grid."""
    return (x / side) % 1 - 0.5, (y / side) % 1 - 0.5


def noise(x: np.ndarray, y: np.ndarray, rng: Generator, frequency: float) -> np.ndarray:
    """A smooth random field: 24 waves of nearly one length in random directions."""
    total = np.zeros_like(x)
    for _ in range(24):
        angle, f = rng.uniform(0, 2 * np.pi), frequency * rng.uniform(0.8, 1.25)
        total += wave((x * np.cos(angle) + y * np.sin(angle)) * f + rng.uniform())
    return total


def dots(x: np.ndarray, y: np.ndarray, rng: Generator) -> np.ndarray:
    u, v = cells(x, y + 0.5 * (np.floor(x) % 2))
    return np.hypot(u, v) < 0.3


def rings(x: np.ndarray, y: np.ndarray, rng: Generator) -> np.ndarray:
    u, v = cells(x, y, 1.6)
    return np.abs(np.hypot(u, v) - 0.3) < 0.09


def bricks(x: np.ndarray, y: np.ndarray, rng: Generator) -> np.ndarray:
    u, v = cells(x / 2 + 0.5 * (np.floor(y) % 2), y)
    return (np.abs(u) < 0.43) & (np.abs(v) < 0.36)


def crosses(x: np.ndarray, y: np.ndarray, rng: Generator) -> np.ndarray:
    u, v = np.abs(cells(x, y, 1.4))
    return (np.minimum(u, v) < 0.1) & (np.maximum(u, v) < 0.34)


def triangles(x: np.ndarray, y: np.ndarray, rng: Generator) -> np.ndarray:
    u, v = cells(x, y, 1.3)
    return (np.abs(v) < 0.4) & (np.abs(u) < (0.4 - v) * 0.6)


# Where a pattern is light; x and y count its periods. The i-th has a hue of 60 degrees times i: i and i + 6 share it.
PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray, Generator], np.ndarray]] = {
    "lying_stripes": lambda x, y, rng: wave(y) > 0,
    "standing_stripes": lambda x, y, rng: wave(x) > 0,
    "checks": lambda x, y, rng: wave(x / 2) * wave(y / 2) > 0,
    "mesh": lambda x, y, rng: np.maximum(wave(x / 1.3), wave(y / 1.3)) > 0.8,
    "dots": dots,
    "rings": rings,
    "bricks": bricks,
    "crosses": crosses,
    "triangles": triangles,
    "zigzag": lambda x, y, rng: wave(y + 0.9 * np.abs(x / 2 % 1 - 0.5)) > 0,
    "blots": lambda x, y, rng: noise(x, y, rng, 0.5) > 0,
    "grain": lambda x, y, rng: noise(x, y, rng, 1.3) > 0,
}
MATERIALS = tuple(PATTERNS)


# --- Images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Materials:
    """Drawn images.

    Attributes:
        pixels: uint8, shape (N, side, side, 3).
        masks: Whether a pixel shows the object; bool, shape (N, side, side).
        labels: Index of the material in ``MATERIALS``, int64, shape (N,): 0 to 11 in turn.
    """

    pixels: np.ndarray
    masks: np.ndarray
    labels: np.ndarray


def draw_mask(x: np.ndarray, y: np.ndarray, rng: Generator) -> np.ndarray:
    """A circle with a few bumps inside the square from -1 to 1."""
    radius = rng.uniform(0.6, 0.9)
    x, y = x - rng.uniform(radius - 0.95, 0.95 - radius), y - rng.uniform(radius - 0.95, 0.95 - radius)
    angle = np.arctan2(y, x)
    bumps = sum(rng.uniform(-0.1, 0.1) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5))
    return np.hypot(x, y) < radius * (1 + bumps)


def draw_image(material: int, size_px: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image (side, side, 3) in uint8 and the mask (side, side) of its object."""
    n = size_px * SUPERSAMPLE
    y, x = np.meshgrid(*[(np.arange(n) + 0.5) / n * 2 - 1] * 2, indexing="ij")
    angle, period = np.deg2rad(rng.uniform(-10, 10)), rng.uniform(0.3, 0.42)
    u = (x * np.cos(angle) + y * np.sin(angle)) / period + rng.uniform(0, 100)
    v = (y * np.cos(angle) - x * np.sin(angle)) / period + rng.uniform(0, 100)
    pattern = np.where(PATTERNS[MATERIALS[material]](u, v, rng), 200.0, 60.0)[..., None]
    hue = np.deg2rad(60 * material + rng.uniform(-20, 20))
    tint = 1 + rng.uniform(0.12, 0.32) * np.cos(hue + np.array([0, 2, 4]) * np.pi / 3)
    mask = draw_mask(x, y, rng)

    image = np.where(mask[..., None], tint * pattern, 128.0)
    image = 128 + rng.uniform(0.45, 1) * (image - 128)  # contrast
    light = rng.uniform(0, 2 * np.pi)
    image *= rng.uniform(0.6, 1.25) + 0.35 * (x * np.cos(light) + y * np.sin(light))[..., None]
    image = image.reshape(size_px, SUPERSAMPLE, size_px, SUPERSAMPLE, 3).mean((1, 3))
    image += rng.normal(0, 4, image.shape)  # the camera
    mask = mask.reshape(size_px, SUPERSAMPLE, size_px, SUPERSAMPLE).mean((1, 3)) > 0.5
    return image.clip(0, 255).astype(np.uint8), mask


def draw_materials(number: int, size_px: int = SIZE_PX, seed: int = SEEDS["train"]) -> Materials:
    """``number`` images, the materials in turn; the same bytes for the same arguments."""
    rng = np.random.default_rng(seed)
    labels = np.arange(number) % len(MATERIALS)
    pixels, masks = zip(*(draw_image(label, size_px, rng) for label in labels), strict=True)
    return Materials(np.stack(pixels), np.stack(masks), labels)


def load_materials(split: str, cache_root: str | os.PathLike | None = None) -> Materials:
    """The embedded data: 1,920 ``train`` or 360 ``val`` images of 32 pixels, drawn in seconds when first asked for.

    Args:
        cache_root: Where they are kept; by default ``datasets`` beside torch.hub's folder. Where nothing can be written
            they are drawn anew in every process.
    """
    root = Path(cache_root or Path(torch.hub.get_dir()).parent / "datasets")
    file = root / f"materials-{VERSION}-{split}.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return Materials(**arrays)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):  # not there yet, or torn
        drawn = draw_materials(NUMBERS[split], seed=SEEDS[split])
    try:
        with atomic_file(file) as temporary:  # processes that start together draw the same: the last one stays
            np.savez_compressed(temporary, pixels=drawn.pixels, masks=drawn.masks, labels=drawn.labels)
    except OSError as error:
        print(f"the embedded images are not kept: {error}", file=sys.stderr)
    return drawn


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("out", type=Path, help="folder to write")
    add("--size", type=int, default=SIZE_PX, help="side of the images in pixels")
    add("--train", type=int, default=NUMBERS["train"], help="number of training images")
    add("--val", type=int, default=NUMBERS["val"], help="number of validation images")
    add("--seed", type=int, default=SEEDS["train"], help="of the training images, the next one of the others")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    from PIL import Image

    for seed, (split, number) in enumerate((("train", args.train), ("val", args.val)), start=args.seed):
        drawn = draw_materials(number, args.size, seed)
        for kind, arrays in {split: drawn.pixels, **({"masks": drawn.masks} if split == "val" else {})}.items():
            for i, (pixels, label) in enumerate(zip(arrays, drawn.labels, strict=True)):
                file = args.out / kind / MATERIALS[label] / f"{i:05}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)


if __name__ == "__main__":
    main()
