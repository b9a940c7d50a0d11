"""The iNaturalist challenges, whose labels are in JSON files."""

import json
from pathlib import Path

import numpy as np

from .sources import FileSource, check_same_classes

CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


def open_inaturalist(root: str | Path, year: int, category: str = "name") -> tuple[FileSource, FileSource]:
    """Train and val part of an iNaturalist challenge: ``train<year>.json``, ``val<year>.json``, ``categories.json``.

    Classes are numbered in the order in which the training annotations name them.

    Args:
        category: Level of the taxonomy, one of ``CATEGORIES``.
    """
    root = Path(root)
    try:
        levels = json.loads((root / "categories.json").read_text())
        parts = [json.loads((root / f"{part}{year}.json").read_text()) for part in ("train", "val")]
    except FileNotFoundError as error:
        raise ValueError(f"--data_path {root}: {error.filename} of iNaturalist {year} is missing") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"--data_path {root}: a JSON file of iNaturalist {year} is damaged: {error}") from error
    class_of = {level.get("id", number): level[category] for number, level in enumerate(levels)}
    classes = list(dict.fromkeys(class_of[entry["category_id"]] for entry in parts[0]["annotations"]))
    number_of = {name: number for number, name in enumerate(classes)}
    sources = []
    for part, name in zip(parts, ("train", "val"), strict=True):
        category_of = {entry["image_id"]: entry["category_id"] for entry in part["annotations"]}
        files = [image["file_name"] for image in part["images"]]
        try:
            labels = [number_of[class_of[category_of[image["id"]]]] for image in part["images"]]
        except KeyError as error:
            reason = "an image without an annotation, or of a class that no training image has"
            raise ValueError(f"{root}/{name}{year}.json: {error.args[0]!r} belongs to {reason}") from error
        sources.append(FileSource(f"{root} (iNaturalist {year}, {name})", root, files, np.array(labels), classes))
    check_same_classes(*sources)
    return sources[0], sources[1]
