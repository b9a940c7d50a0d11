"""Small pictures that are easily told apart: coarse blocks around the colour of a class."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


def picture(seed: int, colour: tuple[int, int, int] = (120, 120, 120), height: int = 40, width: int = 48) -> np.ndarray:
    """uint8, (height, width, 3)."""
    noise = np.random.default_rng(seed).normal(0, 25, size=(height // 8, width // 8, 3))
    blocks = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)


def write_image(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_class_folders(root: Path, images_per_class: int, colours=COLOURS, seed: int = 0) -> Path:
    """``root/<colour>/<number>.png``."""
    for c, (name, colour) in enumerate(colours.items()):
        for i in range(images_per_class):
            write_image(root / name / f"{i:03d}.png", picture(1000 * seed + 100 * c + i, colour))
    return root


def write_train_and_val(root: Path) -> Path:
    """Six images of each class to learn from, three to classify."""
    write_class_folders(root / "train", 6)
    write_class_folders(root / "val", 3, seed=1)
    return root


def write_images(folder: Path, per_class: int = 8) -> Path:
    """``folder/class<c>/class<c>_<number>.png``, three classes that take turns."""
    rng = np.random.default_rng(0)
    for i in range(3 * per_class):
        colour = np.array([40, 40, 40]) + 150 * np.eye(3)[i % 3]
        blocks = np.clip(rng.normal(colour, 40, size=(5, 6, 3)), 0, 255).astype(np.uint8)
        write_image(folder / f"class{i % 3}" / f"class{i % 3}_{i:02d}.png", blocks.repeat(8, axis=0).repeat(8, axis=1))
    return folder
