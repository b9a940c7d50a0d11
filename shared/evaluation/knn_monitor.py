"""Weighted k-NN while a network trains: the cheapest honest sign that features get better."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from shared import distributed
from shared.images.labelled import NotLabelled, open_labelled
from shared.images.loading import BadImages, EvalDataset, EvalTransform
from shared.images.sources import ImageSource

from .features import extract_features
from .knn import knn_classify

AUTOMATIC_UP_TO = 100_000  # images; beyond, an evaluation is worth asking for by flag


class KNNMonitor:
    """Top-1 of weighted k-NN on a validation split, between epochs.

    Args:
        sources: From :func:`shared.images.labelled.open_labelled`; None switches the monitor off.
        image_size: Side in pixels of the centre crops.
        every_epochs: Evaluate after every so many epochs; 0: never. None: before and after training, when there are at
            most 100,000 images.
        epochs: Length of the training.
        k: Neighbours; fewer if the train split is smaller.
        on_bad_image, max_bad_fraction: As for :class:`shared.images.loading.BadImages`.
        output_dir: Where unreadable images are listed, those of the val split in ``bad_images_val.txt``.
        disabled_reason: Why there are no sources, for the summary of the run.

    Attributes:
        sources: Kept for the scripts that evaluate later, too, where there are too many images to do it unasked.
    """

    def __init__(
        self,
        sources: tuple[ImageSource, ImageSource] | None,
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
        disabled_reason: str = "there are no labelled images",
    ):
        self.every_epochs, self.epochs, self.device, self.num_workers = every_epochs, epochs, device, num_workers
        self.latest_features: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.disabled_reason = disabled_reason if sources is None else None
        resize_px = round(image_size * 256 / 224)  # the usual ratio of short side and crop
        self.transform = EvalTransform(resize_px, image_size, mean, std, in_chans)
        self.sources, self.k = sources, k if sources is None else min(k, len(sources[0]))
        if self.disabled_reason is None and every_epochs is None and len(sources[0]) > AUTOMATIC_UP_TO:
            self.disabled_reason = f"there are {len(sources[0]):,} images; ask for it with --eval_knn_freq"
        if every_epochs == 0:
            self.disabled_reason = "--eval_knn_freq 0"
        if self.disabled_reason is None:
            self.train, self.val = (
                EvalDataset(
                    source,
                    self.transform,
                    BadImages(len(source), output_dir and output_dir / listed, on_bad_image, max_bad_fraction),
                )
                for source, listed in zip(sources, ("bad_images.txt", "bad_images_val.txt"), strict=True)
            )

    def is_due(self, epoch: int) -> bool:
        """Whether to evaluate after ``epoch`` (-1: before training)."""
        if self.disabled_reason is not None:
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
        args: Flags of :mod:`shared.run.flags` for data and run, and ``epochs``.
        image_size, mean, std, device, in_chans, num_workers, output_dir: See :class:`KNNMonitor`.

    Raises:
        ValueError: If it was asked for and there are no labelled images.
    """
    labelled, reason = None, "--eval_knn_freq 0"
    if args.eval_knn_freq != 0:
        try:
            labelled = open_labelled(args.data_path, args.val_path, args.allow_absolute_paths)
        except NotLabelled as error:
            if args.eval_knn_freq:
                raise ValueError(f"--eval_knn_freq {args.eval_knn_freq}: {error}") from error
            reason = str(error)
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
        disabled_reason=reason,
    )
    if knn.disabled_reason:
        distributed.print_once(f"no k-NN evaluation: {knn.disabled_reason}")
    return knn
