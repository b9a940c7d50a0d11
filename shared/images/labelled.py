"""Labelled images, to learn from and to classify."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .sources import ImageSource, check_same_classes, open_source


class NotLabelled(ValueError):
    """Images without the classes, or without the val part, that an evaluation needs."""


def open_labelled(
    data_path: str | None, val_path: str | None, allow_absolute_paths: bool = False, flag: str = "--data_path"
) -> tuple[ImageSource, ImageSource]:
    """Labelled train and val images for an evaluation.

    The val images are those of ``val_path``; else the val part of ``data_path``; else a folder ``val`` beside a folder
    ``train``; else one image in ten of ``data_path`` (by the CRC-32 of its relative path).

    Raises:
        NotLabelled: If there are none.
        ValueError: If ``data_path`` cannot be opened, or ``val_path`` does not fit.
    """
    open_images = partial(open_source, allow_absolute_paths=allow_absolute_paths)
    train = open_images(data_path, "train")
    if train.classes is None:
        raise NotLabelled(f"{flag} {data_path}: the images have no classes")
    if len(train.classes) < 2:
        raise NotLabelled(f"{flag} {data_path}: there is only one class, {train.classes[0]!r}")
    if val_path is not None:
        val = open_images(val_path, "all", flag="--val_path")
        check_same_classes(train, val)
        return train, val
    try:
        return _split(data_path, train, open_images)
    except ValueError as error:
        raise NotLabelled(str(error)) from error


def _split(
    data_path: str | None, train: ImageSource, open_images: Callable[..., ImageSource]
) -> tuple[ImageSource, ImageSource]:
    beside = Path(data_path).with_name("val") if data_path and Path(data_path).name == "train" else None
    if beside is not None and beside.is_dir():
        val = open_images(str(beside), "all")
    else:
        try:
            val = open_images(data_path, "val")
        except ValueError:  # no val part
            train, val = (open_images(data_path, split, holdout=True) for split in ("train", "val"))
    check_same_classes(train, val)
    return train, val
