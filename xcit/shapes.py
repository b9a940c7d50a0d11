"""Generated images of coloured shapes in the layouts of COCO and of ADE20K: something to run on without any data."""

import json
from pathlib import Path

import cv2
import numpy as np

CLASSES = ("disc", "square", "triangle")
SIZE_PX = 64


def outline(kind: int, x: float, y: float, radius: float) -> np.ndarray:
    """Corners (K, 2) of a shape."""
    corners = {0: 24, 1: 4, 2: 3}[kind]
    angles = np.arange(corners) * 2 * np.pi / corners + (np.pi / 4 if kind == 1 else np.pi / 2)
    return np.stack([x + radius * np.cos(angles), y - radius * np.sin(angles)], axis=1)


def draw(seed: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """An image (SIZE_PX, SIZE_PX, 3), uint8, and its (class, corners), in the order of drawing."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 80, (SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    shapes = []
    for column in range(rng.integers(1, 3)):  # side by side, so that none hides another
        kind, radius = int(rng.integers(len(CLASSES))), rng.uniform(9, 13)
        x, y = 16 + 32 * column + rng.uniform(-2, 2), rng.uniform(16, SIZE_PX - 16)
        corners = outline(kind, x, y, radius)
        colour = [int(channel) for channel in rng.integers(120, 256, 3)]
        cv2.fillPoly(image, [corners.round().astype(np.int32)], colour)
        shapes.append((kind, corners))
    return image, shapes


def write_coco(root: Path, parts: dict[str, int]) -> Path:
    """``<part>2017/*.png`` and ``annotations/instances_<part>2017.json`` with so many images per part."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for number, (part, count) in enumerate(parts.items()):
        (root / f"{part}2017").mkdir(exist_ok=True)
        images, annotations = [], []
        for i in range(count):
            pixels, shapes = draw(10_000 * number + i)
            name = f"{i:06d}.png"
            cv2.imwrite(str(root / f"{part}2017" / name), pixels[..., ::-1])
            images.append({"id": i + 1, "file_name": name, "height": SIZE_PX, "width": SIZE_PX})
            for kind, corners in shapes:
                (left, top), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i + 1,
                        "category_id": 10 * (kind + 1),
                        "bbox": [left, top, right - left, bottom - top],
                        "segmentation": [corners.flatten().tolist()],
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": 10 * (kind + 1), "name": name} for kind, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))
    return root


def write_ade20k(root: Path, parts: dict[str, int]) -> Path:
    """``images/<part>/*.jpg`` and ``annotations/<part>/*.png``: 0 for no class, else the number of the class from 1."""
    for number, (part, count) in enumerate(parts.items()):
        for folder in ("images", "annotations"):
            (root / folder / part).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels, shapes = draw(10_000 * number + i)
            labels = np.full((SIZE_PX, SIZE_PX), len(CLASSES) + 1, dtype=np.uint8)  # the last class is background
            for kind, corners in shapes:
                cv2.fillPoly(labels, [corners.round().astype(np.int32)], kind + 1)
            labels[:2] = 0  # as at the borders of ADE20K's images
            cv2.imwrite(str(root / "images" / part / f"{i:06d}.jpg"), pixels[..., ::-1])
            cv2.imwrite(str(root / "annotations" / part / f"{i:06d}.png"), labels)
    return root
