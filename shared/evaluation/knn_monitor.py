"""Weighted k-NN while a network trains: the cheapest honest sign that features get better."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from shared import distributed
from shared.data import BadImages, EvalDataset, EvalTransform, ImageSource, check_same_classes, open_source

from .features import extract_features
from .knn import knn_classify

AUTOMATIC_UP_TO = 100_000  # images; beyond, an evaluation is worth asking for by flag


def open_labelled(
    data_path: str | None, val_path: str | None, allow_absolute_paths: bool = False
) -> tuple[ImageSource, ImageSource] | str:
    """Labelled train and val images for an evaluation, or the reason why there are none.

    The val images are those of ``val_path``; else the val part of ``data_path``; else a folder ``val`` beside a folder
    ``train``; else one image in ten of ``data_path`` (by the CRC-32 of its relative path).

    Raises:
        ValueError: If ``data_path`` cannot be opened, or ``val_path`` does not fit.
    """
    open_images = partial(open_source, allow_absolute_paths=allow_absolute_paths)
    train = open_images(data_path, "train")
    if train.classes is None:
        return "the images have no classes"
    if len(train.classes) < 2:
        return f"there is only one class, {train.classes[0]!r}"
    if val_path is not None:
        val = open_images(val_path, "all", flag="--val_path")
        check_same_classes(train, val)
        return train, val
    try:
        return _split(data_path, train, open_images)
    except ValueError as error:
        return str(error).removeprefix(f"--data_path {data_path}: ")


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


class KNNMonitor:
    """Top-1 of weighted k-NN on a validation split, between epochs.

    Args:
        sources: From :func:`open_labelled`; a reason switches the monitor off.
        image_size: Side in pixels of the centre crops.
        every_epochs: Evaluate after every so many epochs; 0: never. None: before and after training, when there are at
            most 100,000 images.
        epochs: Length of the training.
        k: Neighbours; fewer if the train split is smaller.
        on_bad_image, max_bad_fraction: As for :class:`shared.data.BadImages`.
        output_dir: Where unreadable images are listed, those of the val split in ``bad_images_val.txt``.
    """

    def __init__(
        self,
        sources: tuple[ImageSource, ImageSource] | str,
        image_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        every_epochs: int | None,
        epochs: int,
        device: torch.device,
        in_chans: int = 3,
        num_workers: int = 0,
        k: int = 20,
        on_bad_image: str = "replace",
        max_bad_fraction: float = 0.01,
        output_dir: Path | None = None,
    ):
        self.every_epochs, self.epochs, self.device, self.num_workers = every_epochs, epochs, device, num_workers
        self.latest_features: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.off = sources if isinstance(sources, str) else None
        if self.off is None and every_epochs is None and len(sources[0]) > AUTOMATIC_UP_TO:
            self.off = f"there are {len(sources[0]):,} images; ask for it with --eval_knn_freq"
        if every_epochs == 0:
            self.off = "--eval_knn_freq 0"
        if self.off is None:
            resize_px = round(image_size * 256 / 224)  # the usual ratio of short side and crop
            transform = EvalTransform(resize_px, image_size, mean, std, in_chans)
            self.train, self.val = (
                EvalDataset(
                    source,
                    transform,
                    BadImages(len(source), output_dir and output_dir / listed, on_bad_image, max_bad_fraction),
                )
                for source, listed in zip(sources, ("bad_images.txt", "bad_images_val.txt"), strict=True)
            )
            self.k = min(k, len(sources[0]))

    def is_due(self, epoch: int) -> bool:
        """Whether to evaluate after ``epoch`` (-1: before training)."""
        if self.off is not None:
            return False
        ends = epoch in (-1, self.epochs - 1)
        return ends or (self.every_epochs is not None and (epoch + 1) % self.every_epochs == 0)

    def features(
        self, backbone: nn.Module, between_batches: Callable[[], None] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Train features, train labels, val features, val labels."""
        return tuple(
            tensor
            for dataset in (self.train, self.val)
            for tensor in extract_features(
                backbone, dataset, self.device, num_workers=self.num_workers, between_batches=between_batches
            )
        )

    def run(self, backbone: nn.Module, between_batches: Callable[[], None] | None = None) -> float:
        """Top-1 in percent.

        Args:
            between_batches: Called after every batch, equally often on every process; may raise to stop.
        """
        self.latest_features = self.features(backbone, between_batches)
        return knn_classify(*self.latest_features, k=self.k)[0]


def build_knn_monitor(
    args: argparse.Namespace,
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    num_workers: int,
    output_dir: Path,
    in_chans: int = 3,
) -> KNNMonitor:
    """The monitor that the flags of a training script ask for; says why when there is none.

    Args:
        args: Flags of :func:`shared.flags.add_data_flags` and :func:`shared.flags.add_run_flags`, and ``epochs``.
        image_size, mean, std, device, in_chans, num_workers, output_dir: See :class:`KNNMonitor`.

    Raises:
        ValueError: If it was asked for and there are no labelled images.
    """
    labelled = "off"
    if args.eval_knn_freq != 0:
        labelled = open_labelled(args.data_path, args.val_path, args.allow_absolute_paths)
    if args.eval_knn_freq and isinstance(labelled, str):
        raise ValueError(f"--eval_knn_freq {args.eval_knn_freq}: {labelled}")
    knn = KNNMonitor(
        labelled,
        image_size,
        mean,
        std,
        args.eval_knn_freq,
        args.epochs,
        device,
        in_chans,
        num_workers,
        on_bad_image=args.on_bad_image,
        max_bad_fraction=args.max_bad_fraction,
        output_dir=output_dir,
    )
    if knn.off:
        distributed.print_once(f"no k-NN evaluation: {knn.off}")
    return knn
