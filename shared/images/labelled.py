"""Labelled images, to learn from and to classify."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from shared import distributed
from shared.networks.pretrained import flags_of_run

from .sources import ImageSource, check_same_classes, open_source
from .subsets import Subset


class NotLabelled(ValueError):
    """Images without the classes, or without the val part, that an evaluation needs."""


def open_labelled(
    data_path: str | None,
    val_path: str | None,
    flag: str = "--data_path",
    shared_classes_only: bool | None = None,
    **reading_options,
) -> tuple[ImageSource, ImageSource]:
    """Labelled train and val images for an evaluation, with the classes of the train images.

    The val images are those of ``val_path``; else the val part of ``data_path``; else a folder ``val`` beside a folder
    ``train``; else one image in ten of ``data_path`` (by the CRC-32 of its relative path).

    Args:
        flag: Of ``data_path``, for messages.
        shared_classes_only: Where the two parts differ in their classes, leave out the images of those that only one
            part has; None where there is no such flag.
        reading_options: Further arguments of :func:`shared.images.sources.open_source`.

    Raises:
        NotLabelled: If there are none.
        ValueError: If ``data_path`` cannot be opened, or ``val_path`` does not fit.
    """
    open_images = partial(open_source, **reading_options)
    train = open_images(data_path, "train")
    if train.classes is None:
        raise NotLabelled(f"{flag} {data_path}: the images have no classes")
    if len(train.classes) < 2:
        raise NotLabelled(f"{flag} {data_path}: there is only one class, {train.classes[0]!r}")
    if val_path is not None:
        return match_classes(train, open_val(data_path, val_path, **reading_options), shared_classes_only)
    try:
        val = open_val(data_path, None, **reading_options)
        if val is None:
            train, val = (open_images(data_path, split, holdout=True) for split in ("train", "val"))
        return match_classes(train, val, shared_classes_only)
    except ValueError as error:
        raise NotLabelled(str(error)) from error


def open_val(data_path: str | None, val_path: str | None, **reading_options) -> ImageSource | None:
    """The images of ``val_path``, else the val part of ``data_path``, else a folder ``val`` beside it; None: neither.

    Raises:
        ValueError: If ``val_path`` cannot be opened.
    """
    if val_path is not None:
        return open_source(val_path, "all", flag="--val_path", **reading_options)
    folder = Path(data_path or "").absolute()  # "." too has a name
    if data_path and folder.name == "train" and (beside := folder.with_name("val")).is_dir():
        return open_source(str(beside), "all", **reading_options)
    try:
        return open_source(data_path, "val", **reading_options)
    except ValueError:
        return None


def match_classifier(
    images: ImageSource, names: Sequence[str] | None, shared_classes_only: bool | None = None
) -> ImageSource:
    """Images to classify with the classes that a classifier was trained on, in their order, matched by name.

    Args:
        names: Of these classes; None, as in files that do not say: the images stay as they are.

    Raises:
        ValueError: If the images have none, or other ones.
    """
    if names is None:
        return images
    trained = ImageSource("those that the classifier was trained on", None, names)
    return match_val(trained, images, shared_classes_only)[0]


def check_classes(weights_flag: str, weights: str | Path, classes: Sequence[str]) -> None:
    """Refuse a classifier that names its classes, if these are others or in another order.

    Raises:
        ValueError: With both, and the flag of the weights.
    """
    if names := flags_of_run(weights).get("classes"):
        trained = ImageSource(f"those that {weights_flag} was trained on", None, names)
        check_same_classes(trained, ImageSource("the data set", None, classes))


def match_classes(
    train: ImageSource, val: ImageSource, shared_classes_only: bool | None = None
) -> tuple[ImageSource, ImageSource]:
    """Both parts with the classes and labels of ``train``, matched by name; see :func:`match_val`."""
    val, missing = match_val(train, val, shared_classes_only)
    if missing:
        train = Subset(train, np.flatnonzero(~np.isin(train.labels, missing)), train.name)
    return train, val


def match_val(
    train: ImageSource, val: ImageSource, shared_classes_only: bool | None = None
) -> tuple[ImageSource, list[int]]:
    """Images to classify with the classes and labels of ``train``, matched by name, and the classes that they lack.

    Args:
        train: Anything with classes.
        shared_classes_only: As for :func:`open_labelled`.

    Raises:
        ValueError: If ``val`` has no classes, or lacks or adds some, which are named.
    """
    shared = set(train.classes) & set(val.classes or ())
    if not shared:
        check_same_classes(train, val)
    left_out = {"train": set(train.classes) - shared, "val": set(val.classes) - shared}
    if any(left_out.values()) and not shared_classes_only:
        hint = f"; --shared_classes_only true scores over the {len(shared)} classes that both have"
        check_same_classes(train, val, "" if shared_classes_only is None else hint)
    for part, names in left_out.items():
        if names:
            distributed.print_once(f"left out {len(names)} classes only in {part}: {', '.join(sorted(names)[:20])}")
    label_of = {name: label for label, name in enumerate(train.classes)}
    labels = np.array([label_of.get(name, -1) for name in val.classes])[val.labels]
    if left_out["val"]:
        val = Subset(val, np.flatnonzero(labels >= 0), val.name)
    val.labels, val.classes = labels[labels >= 0], train.classes
    return val, sorted(label_of[name] for name in left_out["train"])
