"""Images and label maps in ADE20K's layout."""

import random
import zlib
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared.images.decode import EXTENSIONS, ImageError
from shared.images.sources import FileSource

from ..dense_training import DenseDataset

UNLABELLED = 255
SCALES = (0.5, 2.0)  # of the image, before the crop
LARGEST_CLASS_SHARE = 0.75  # a crop with more of one class is drawn anew, at most ten times


class ADE20KDataset(DenseDataset):
    """``images/<part>/*.jpg`` with ``annotations/<part>/*.png`` below ``root``: 0 for no class, else its number from 1.

    Targets: ``labels`` (H, W), int64, classes from 0, 255 where there is none. Images for evaluation keep their size in
    ``labels`` and have a short side of ``crop_px``.

    Args:
        crop_px: Side of the training crops.
        num_classes: Label maps with more are an error; None: any number.
    """

    def __init__(
        self,
        root: str | Path,
        part: str,
        crop_px: int = 512,
        seed: int = 0,
        augment: bool = True,
        num_classes: int | None = None,
    ):
        root = Path(root)
        self.num_classes = num_classes
        folder = root / "images" / part
        files = sorted(p.name for p in folder.glob("*") if p.suffix.lower() in EXTENSIONS)
        if not files:
            raise ValueError(f"--data-path {root}: no images in {folder}")
        self.label_maps = [root / "annotations" / part / Path(file).with_suffix(".png").name for file in files]
        missing = next((path for path in self.label_maps if not path.is_file()), None)
        if missing is not None:
            raise ValueError(f"--data-path {root}: {missing} is missing")
        sizes = np.array([path.stat().st_size for path in self.label_maps])  # reading them all would take long
        super().__init__(FileSource(str(folder), folder, files), seed, augment, zlib.crc32(sizes))
        self.crop_px = crop_px

    def sample(self, index: int, rng: random.Random) -> tuple[Tensor, dict]:
        pixels = self.source.load(index).decode()
        labels = read_label_map(self.label_maps[index], *pixels.shape[:2])
        if self.num_classes is not None and labels.max() > self.num_classes:
            raise ValueError(
                f"{self.label_maps[index]} has the class {labels.max()}, there are {self.num_classes} (--num-classes)"
            )
        labels = labels - np.uint8(1)  # 0, no class, becomes 255
        if self.augment:
            pixels, labels = augment(pixels, labels, self.crop_px, rng)
        else:
            scale = min(self.crop_px / min(pixels.shape[:2]), 4 * self.crop_px / max(pixels.shape[:2]))
            pixels = resize(pixels, scale, cv2.INTER_LINEAR)
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255
        return image, {"labels": torch.from_numpy(np.ascontiguousarray(labels)).long()}


def read_label_map(path: Path, height: int, width: int) -> np.ndarray:
    """Numbers of classes (H, W), uint8: the grey values of a PNG file, or its pixels' numbers in a palette.

    Raises:
        ImageError: If the file cannot be read.
        ValueError: If it holds something else, or its size is not that of its image.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            mode, size, pixels = image.mode, image.size, None
            if mode in ("L", "P") and size == (width, height):
                pixels = np.array(image)
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        raise ImageError(f"{path}: {error or type(error).__name__}") from error
    if mode not in ("L", "P"):
        raise ValueError(f"{path} has pixels of Pillow's mode {mode}, expected 8 bits of grey (L) or of a palette (P)")
    if pixels is None:
        raise ValueError(f"{path} has {size[1]} x {size[0]} pixels, its image {height} x {width}")
    return pixels


def resize(image: np.ndarray, scale: float, interpolation: int) -> np.ndarray:
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=interpolation)


def augment(pixels: np.ndarray, labels: np.ndarray, crop_px: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """A crop of a resized image, flipped in one of two cases, with other colours."""
    scale = rng.uniform(*SCALES) * crop_px / min(pixels.shape[:2])
    pixels, labels = resize(pixels, scale, cv2.INTER_LINEAR), resize(labels, scale, cv2.INTER_NEAREST)
    for _ in range(10):
        top, left = (rng.randint(0, max(0, side - crop_px)) for side in labels.shape)
        crop = labels[top : top + crop_px, left : left + crop_px]
        counts = np.bincount(crop[crop != UNLABELLED], minlength=1)
        if counts.max() < LARGEST_CLASS_SHARE * counts.sum():
            break
    pixels, labels = pixels[top : top + crop_px, left : left + crop_px], crop
    if rng.random() < 0.5:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    pixels = distort_colours(np.ascontiguousarray(pixels), rng)
    bottom, right = (crop_px - side for side in labels.shape)
    pixels = np.pad(pixels, ((0, bottom), (0, right), (0, 0)))
    return pixels, np.pad(labels, ((0, bottom), (0, right)), constant_values=UNLABELLED)


def distort_colours(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each in one of two cases."""
    image = pixels.astype(np.float32)
    if rng.random() < 0.5:
        image += rng.uniform(-32, 32)
    if rng.random() < 0.5:
        image *= rng.uniform(0.5, 1.5)
    hsv = cv2.cvtColor(image.clip(0, 255).astype(np.uint8), cv2.COLOR_RGB2HSV).astype(np.int32)
    if rng.random() < 0.5:
        hsv[..., 1] = (hsv[..., 1] * rng.uniform(0.5, 1.5)).clip(0, 255)
    if rng.random() < 0.5:
        hsv[..., 0] = (hsv[..., 0] + rng.randint(-18, 18)) % 180
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)
