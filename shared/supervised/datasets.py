"""The labelled data sets that the supervised recipes know by name."""

import argparse
import json
from pathlib import Path

import numpy as np

from shared.images.labelled import open_labelled
from shared.images.sources import FileSource, ImageSource, check_same_classes, open_source

DATA_SETS = ("CIFAR10", "CIFAR100", "IMNET", "INAT", "INAT19", "CARS", "FLOWERS", "IMNET22k")
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
YEARS = {"INAT": 2018, "INAT19": 2019}


def open_train_and_val(args: argparse.Namespace) -> tuple[ImageSource, ImageSource]:
    """The labelled images that ``--data-set``, ``--data_path`` and ``--val_path`` name.

    With ``--eval`` and ``--val_path`` both are the images to evaluate on: those of the training are not needed.

    Raises:
        ValueError: If there are none, they have no classes, or the classes of both parts differ.
    """
    if args.eval and args.val_path is not None:
        val = open_source(args.val_path, "all", allow_absolute_paths=args.allow_absolute_paths, flag="--val_path")
        check_same_classes(val, val)  # that there are any
        return val, val
    if args.data_path is not None and args.data_set.startswith("CIFAR"):
        name = args.data_set.lower()
        root = None if args.data_path.lower() == name else args.data_path
        return open_source(name, "train", download_root=root), open_source(name, "val", download_root=root)
    if args.data_path is not None and args.data_set in YEARS:
        return open_inaturalist(args.data_path, YEARS[args.data_set], args.inat_category)
    return open_labelled(args.data_path, args.val_path, args.allow_absolute_paths)


def open_inaturalist(root: str | Path, year: int, category: str = "name") -> tuple[FileSource, FileSource]:
    """Train and val part of an iNaturalist challenge: ``train<year>.json``, ``val<year>.json``, ``categories.json``.

    Classes are numbered in the order in which the training annotations name them.

    Args:
        category: Level of the taxonomy, one of ``INAT_CATEGORIES``.
    """
    root = Path(root)
    try:
        levels = json.loads((root / "categories.json").read_text())
        parts = [json.loads((root / f"{part}{year}.json").read_text()) for part in ("train", "val")]
    except FileNotFoundError as error:
        raise ValueError(f"--data_path {root}: {error.filename} of iNaturalist {year} is missing") from error
    class_of = {level.get("id", number): level[category] for number, level in enumerate(levels)}
    classes = list(dict.fromkeys(class_of[entry["category_id"]] for entry in parts[0]["annotations"]))
    number_of = {name: number for number, name in enumerate(classes)}
    sources = []
    for part, name in zip(parts, ("train", "val"), strict=True):
        category_of = {entry["image_id"]: entry["category_id"] for entry in part["annotations"]}
        files = [image["file_name"] for image in part["images"]]
        labels = [number_of[class_of[category_of[image["id"]]]] for image in part["images"]]
        sources.append(FileSource(f"{root} (iNaturalist {year}, {name})", root, files, np.array(labels), classes))
    check_same_classes(*sources)
    return sources[0], sources[1]
