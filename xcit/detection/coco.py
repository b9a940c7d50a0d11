"""Images and instances in COCO's layout."""

import json
import random
import zlib
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as run_lengths
from torch import Tensor

from shared.images.sources import FileSource

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

    Attributes:
        annotations: The content of the JSON file.
        classes: Names of the categories by label, from label 1 on; ``category_ids`` are their numbers.
        image_ids: COCO's number of every image.

    Raises:
        ValueError: If the JSON file is missing or damaged, or no image has an object.
    """

    def __init__(
        self,
        root: str | Path,
        part: str,
        seed: int = 0,
        augment: bool = True,
        crop: bool = True,
    ):
        root = Path(root)
        path = root / "annotations" / f"instances_{part}2017.json"
        if not path.is_file():
            raise ValueError(f"--data-path {root}: {path} is missing")
        self.annotations = content = read_annotations(path)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.classes = [category["name"] for category in categories]
        self.category_ids = [category["id"] for category in categories]
        label_of = {number: label for label, number in enumerate(self.category_ids, start=1)}
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        instances: dict[int, list[dict]] = {}
        for annotation in content["annotations"]:
            visible_px = visible_side(annotation["bbox"], *sizes[annotation["image_id"]])
            # crowds and objects of less than a pixel are left out of the training only
            if not augment or (not annotation.get("iscrowd") and visible_px >= 1):
                labelled = annotation | {"label": label_of[annotation["category_id"]]}
                instances.setdefault(annotation["image_id"], []).append(labelled)
        # images without an object teach a detector nothing, but count in its evaluation
        images = [image for image in content["images"] if not augment or image["id"] in instances]
        if not images:
            raise ValueError(f"--data-path {root}: no images with objects in {path}")
        self.image_ids = [image["id"] for image in images]
        self.sizes = [sizes[number] for number in self.image_ids]
        self.instances = [instances.get(image["id"], []) for image in images]
        files = [image["file_name"] for image in images]
        source = FileSource(str(root / f"{part}2017"), root / f"{part}2017", files)
        super().__init__(source, seed, augment, zlib.crc32(path.read_bytes()))
        self.crop = crop

    def sample(self, index: int, rng: random.Random) -> tuple[Tensor, dict]:
        pixels = self.source.load(index).decode()
        if pixels.shape[:2] != self.sizes[index]:
            height, width = self.sizes[index]
            raise ValueError(
                f"{self.source.path(index)} has {pixels.shape[0]} x {pixels.shape[1]} pixels, "
                f"its annotations are for {height} x {width}"
            )
        target = read_instances(self.instances[index], *pixels.shape[:2])
        if self.augment and rng.random() < 0.5:
            pixels, target = flip(pixels, target)
        if self.augment and self.crop and rng.random() < 0.5:
            pixels, target = random_crop(pixels, target, rng)
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255
        return image, {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in target.items()}


def read_annotations(path: Path) -> dict:
    """The content of a file of instances, after a look at what is used of it.

    Raises:
        ValueError: If it is no JSON, a part or an entry of it is missing, a number of an image or a category is given
            twice, or an annotation is of an image or a category that is not listed, or has no box or outline.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        ids = {part: {entry["id"] for entry in content[part]} for part in ("images", "categories")}
        for part, different in ids.items():
            if len(different) < len(content[part]):
                raise ValueError(f"{path}: two of the {part} have the same id")
        sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"] if image["file_name"]}
        for category in content["categories"]:
            _ = category["name"]
        for annotation in content["annotations"]:
            name = f"annotation {annotation['id']}"
            for key, part in (("image_id", "images"), ("category_id", "categories")):
                if annotation[key] not in ids[part]:
                    raise ValueError(f"{path}: {name} has the {key} {annotation[key]}, which is not among the {part}")
            if len(annotation["bbox"]) != 4 or not all(isinstance(side, int | float) for side in annotation["bbox"]):
                raise ValueError(f"{path}: the bbox of {name} is {annotation['bbox']}, expected four numbers")
            outline, size = annotation["segmentation"], sizes[annotation["image_id"]]
            if isinstance(outline, dict) and not fill(outline, *size):
                raise ValueError(f"{path}: the runs of {name} are not those of an image of {size[0]} x {size[1]}")
            if isinstance(outline, list):
                # fewer than three points enclose nothing, and pycocotools takes four numbers for a box
                annotation["segmentation"] = outline = [polygon for polygon in outline if len(polygon) >= 6]
                if not outline or any(len(polygon) % 2 for polygon in outline):
                    raise ValueError(f"{path}: {name} has no polygon of three points or more, or an odd number in one")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, or no JSON: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not in COCO's layout of instances: {error} is missing or wrong") from error
    return content


def fill(runs: dict, height: int, width: int) -> bool:
    """Whether run lengths, where they can be read, are those of an image of this size; pycocotools does not check."""
    counts = runs["counts"]
    complete = not isinstance(counts, list) or (min(counts, default=-1) >= 0 and sum(counts) == height * width)
    return list(runs["size"]) == [height, width] and complete


def visible_side(bbox: list[float], height: int, width: int) -> float:
    """The shorter side, in pixels, of what lies inside the image of a box (left, top, width, height)."""
    left, top, box_width, box_height = bbox
    inside = (min(left + box_width, width) - max(left, 0), min(top + box_height, height) - max(top, 0))
    return min(inside)


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
    """A mask (H, W) of 0 and 1, from polygons or from the lengths of runs down the columns, compressed or not."""
    if isinstance(segmentation, dict):
        compressed = segmentation
        if isinstance(segmentation["counts"], list):
            compressed = run_lengths.frPyObjects(segmentation, height, width)
    else:
        compressed = run_lengths.merge(run_lengths.frPyObjects(segmentation, height, width))
    return run_lengths.decode(compressed)


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
