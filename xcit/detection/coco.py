"""Images and instances in COCO's layout, read without other packages."""

import json
import random
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from shared.data import BadImages, FileSource

from ..dense_training import DenseDataset

CROP_PX = (384, 600)  # of a short side of 400 to 600 pixels
RESIZE_PX = (400, 500, 600)


class CocoDataset(DenseDataset):
    """``<part>2017/`` with ``annotations/instances_<part>2017.json`` below ``root``.

    Targets are torchvision's: ``boxes`` (K, 4) as left, top, right, bottom in pixels; ``labels`` (K,) from 1, in the
    order of the categories' numbers; ``masks`` (K, H, W), uint8; ``crowd`` (K,), regions of many objects, which are in
    targets of evaluation only.

    Args:
        crop: Whether half of the training images are random crops.
    """

    def __init__(
        self,
        root: str | Path,
        part: str,
        seed: int = 0,
        augment: bool = True,
        crop: bool = True,
        bad_images: BadImages | None = None,
    ):
        root = Path(root)
        path = root / "annotations" / f"instances_{part}2017.json"
        if not path.is_file():
            raise ValueError(f"--data-path {root}: {path} is missing")
        content = json.loads(path.read_text())
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.classes = [category["name"] for category in categories]
        label_of = {category["id"]: label for label, category in enumerate(categories, start=1)}
        instances: dict[int, list[dict]] = {}
        for annotation in content["annotations"]:
            # crowds and objects of less than a pixel are left out of the training only
            if not augment or (not annotation.get("iscrowd") and min(annotation["bbox"][2:]) >= 1):
                annotation["label"] = label_of[annotation["category_id"]]
                instances.setdefault(annotation["image_id"], []).append(annotation)
        # images without an object teach a detector nothing, but count in its evaluation
        images = [image for image in content["images"] if not augment or image["id"] in instances]
        if not images:
            raise ValueError(f"--data-path {root}: no images with objects in {path}")
        self.instances = [instances.get(image["id"], []) for image in images]
        files = [image["file_name"] for image in images]
        source = FileSource(str(root / f"{part}2017"), root / f"{part}2017", files)
        super().__init__(source, seed, augment, bad_images)
        self.crop = crop

    def sample(self, index: int, rng: random.Random) -> tuple[Tensor, dict]:
        pixels = self.source.load(index).decode()
        target = read_instances(self.instances[index], *pixels.shape[:2])
        if self.augment and rng.random() < 0.5:
            pixels, target = flip(pixels, target)
        if self.augment and self.crop and rng.random() < 0.5:
            pixels, target = random_crop(pixels, target, rng)
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255
        return image, {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in target.items()}


def read_instances(annotations: list[dict], height: int, width: int) -> dict[str, np.ndarray]:
    """Boxes, labels, masks and crowds of one image; see :class:`CocoDataset`."""
    count = len(annotations)
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float32).reshape(count, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes.clip(0, [width, height, width, height]).astype(np.float32)
    masks = [read_mask(annotation["segmentation"], height, width) for annotation in annotations]
    return {
        "boxes": boxes,
        "labels": np.array([annotation["label"] for annotation in annotations], dtype=np.int64),
        "masks": np.stack(masks) if masks else np.zeros((0, height, width), dtype=np.uint8),
        "crowd": np.array([bool(annotation.get("iscrowd")) for annotation in annotations], dtype=bool),
    }


def read_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """A mask (H, W) of 0 and 1, from polygons or from the lengths of runs down the columns.

    Raises:
        ValueError: For compressed runs, which COCO's own annotations do not have.
    """
    if isinstance(segmentation, dict):
        if not isinstance(segmentation["counts"], list):
            raise ValueError("annotations with compressed run lengths are not understood; store counts as lists")
        runs = np.repeat(np.arange(len(segmentation["counts"])) % 2, segmentation["counts"])
        return runs.astype(np.uint8).reshape(width, height).T
    mask = np.zeros((height, width), dtype=np.uint8)
    for polygon in segmentation:
        draw_polygon(mask, np.array(polygon, dtype=np.float64).reshape(-1, 2))
    return mask


def draw_polygon(mask: np.ndarray, corners: np.ndarray, zoom: int = 4) -> None:
    """Set the pixels of which more than half lie inside a polygon; pixel (i, j) covers [j, j + 1] x [i, i + 1].

    OpenCV draws borders too, so the polygon is drawn several times as large and counted.

    Args:
        corners: (K, 2), x and y.
        zoom: How many times as large; borders are off by half a pixel at this size.
    """
    left, top = np.floor(corners.min(axis=0)).astype(int).clip(0)
    right, bottom = np.ceil(corners.max(axis=0)).astype(int).clip(0, mask.shape[::-1])
    if right <= left or bottom <= top:
        return
    canvas = np.zeros(((bottom - top) * zoom, (right - left) * zoom), dtype=np.uint8)
    cv2.fillPoly(canvas, [((corners - [left, top]) * zoom - 0.5).round().astype(np.int32)], 1)
    covered = canvas.reshape(bottom - top, zoom, right - left, zoom).mean(axis=(1, 3))
    mask[top:bottom, left:right] |= (covered > 0.5).astype(np.uint8)


def flip(pixels: np.ndarray, target: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The mirror image."""
    boxes = target["boxes"].copy()
    boxes[:, [0, 2]] = pixels.shape[1] - boxes[:, [2, 0]]
    return pixels[:, ::-1], target | {"boxes": boxes, "masks": target["masks"][:, :, ::-1]}


def random_crop(
    pixels: np.ndarray, target: dict[str, np.ndarray], rng: random.Random
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A crop of 384 to 600 pixels of the image, as if its short side had been resized to 400, 500 or 600 pixels.

    The network's own resizing follows. Objects of which less than a pixel is left go; a crop without any is not made.
    """
    scale = min(pixels.shape[:2]) / rng.choice(RESIZE_PX)
    sides = [min(side, round(scale * rng.randint(*CROP_PX))) for side in pixels.shape[:2]]
    top, left = (rng.randint(0, full - side) for full, side in zip(pixels.shape[:2], sides, strict=True))
    boxes = target["boxes"] - np.array([left, top, left, top], dtype=np.float32)
    boxes = boxes.clip(0, [sides[1], sides[0]] * 2).astype(np.float32)
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1)
    if not kept.any():
        return pixels, target
    rows, columns = slice(top, top + sides[0]), slice(left, left + sides[1])
    target = {name: value[kept] for name, value in (target | {"boxes": boxes}).items()}
    return pixels[rows, columns], target | {"masks": target["masks"][:, rows, columns]}
