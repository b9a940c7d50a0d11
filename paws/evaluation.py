"""Classification with the labelled images as supports: the classifier, representations of images, an evaluation."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared import distributed
from shared.evaluation.features import extract_features
from shared.images.labelled import NotLabelled
from shared.images.loading import BadImages, EvalDataset, EvalTransform
from shared.images.sources import ImageSource, open_source
from shared.networks.backbones import input_channels

from .augmentations import Recipe
from .heads import Encoder
from .labels import PartlyLabelled
from .losses import soft_nearest_neighbours
from .networks import Representation

AUTOMATIC_UP_TO = 100_000  # images to classify; beyond, an evaluation is worth asking for by flag
QUERY_BLOCK = 1024


def classify(
    queries: Tensor, supports: Tensor, support_labels: Tensor, num_classes: int, temperature: float = 0.1
) -> Tensor:
    """Class probabilities (N, C) of representations (N, D) by the vote of labelled ones (M, D), labels (M,) int64."""
    labels = F.one_hot(support_labels, num_classes).to(supports)
    return torch.cat(
        [soft_nearest_neighbours(block, supports, labels, temperature) for block in queries.split(QUERY_BLOCK)]
    )


def top_k(probabilities: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 (among the min(5, C) likeliest) accuracy in percent."""
    best = probabilities.topk(min(5, probabilities.shape[1]), dim=1).indices
    hits = best == labels.to(best.device)[:, None]
    return 100 * hits[:, 0].float().mean().item(), 100 * hits.any(dim=1).float().mean().item()


# --- Images -----------------------------------------------------------------------------------------------------------


@dataclass
class Validation:
    """Images whose classes are known and were not used: all of a source, or some of its rows."""

    source: ImageSource
    rows: np.ndarray

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(self.source.labels[self.rows])

    def describe(self) -> str:
        which = "" if len(self.rows) == len(self.source) else " without a label in training"
        return f"{len(self.rows):,} images{which} of {self.source.name}"


def open_validation(
    images: PartlyLabelled, data_path: str | None, val_path: str | None, allow_absolute_paths: bool = False
) -> Validation:
    """Images to classify: ``val_path``; else the val part of ``data_path``; else those whose labels were kept back.

    Raises:
        NotLabelled: If there are none.
        ValueError: If they cannot be opened or have other classes.
    """
    open_images = partial(open_source, allow_absolute_paths=allow_absolute_paths)
    if val_path is not None:
        val = open_images(val_path, "all", flag="--val_path")
        check_classes(images, val)
        return Validation(val, np.arange(len(val)))
    if images.truth is None:
        raise NotLabelled("the classes of the unlabelled images are not known; give labelled ones as --val_path")
    beside = Path(data_path).with_name("val") if data_path and Path(data_path).name == "train" else None
    try:
        val = open_images(str(beside), "all") if beside and beside.is_dir() else open_images(data_path, "val")
    except ValueError as error:
        if "has no val part" not in str(error):
            raise
        if len(images.unlabelled) == 0:
            raise NotLabelled("all images have a label that is used; give others to classify as --val_path") from error
        return Validation(images.source, images.unlabelled)
    check_classes(images, val)
    return Validation(val, np.arange(len(val)))


def check_classes(images: PartlyLabelled, val: ImageSource) -> None:
    """Raise ``ValueError`` unless the images to classify have the classes of the labels, in the same order."""
    if val.classes is None:
        raise ValueError(f"{val.name} has no classes to evaluate: expected one folder per class, or labels")
    if val.classes != images.classes:
        different = sorted(set(val.classes) ^ set(images.classes))
        raise ValueError(
            f"{val.name} has other classes ({len(val.classes)}) than the labels ({len(images.classes)}): "
            + ", ".join(different[:5])
        )


def eval_transform(recipe: Recipe, encoder: Encoder) -> EvalTransform:
    """Resize, crop the centre, normalise, for the channels that the encoder takes."""
    return EvalTransform(
        recipe.eval_resize_px, recipe.large[0], recipe.mean, recipe.std, input_channels(encoder), "bilinear"
    )


def representations(
    encoder: Encoder,
    source: ImageSource,
    rows: np.ndarray,
    recipe: Recipe,
    device: torch.device,
    *,
    use_pred: bool = False,
    batch_size: int = 128,
    num_workers: int = 0,
    bad_images: BadImages | None = None,
    between_batches: Callable[[], None] | None = None,
) -> Tensor:
    """Representations (len(rows), D) of images in evaluation mode; every process must call this."""
    dataset = EvalDataset(source, eval_transform(recipe, encoder), bad_images, rows.tolist())
    module = Representation(encoder, use_pred).train(encoder.training)
    features, _ = extract_features(module, dataset, device, batch_size, num_workers, between_batches=between_batches)
    return features


class SNNMonitor:
    """Top-1 of the soft nearest-neighbour classifier, between epochs.

    Args:
        images: Their labelled ones are the supports.
        validation: What is classified; None switches the monitor off.
        every_epochs: Evaluate after every so many epochs; 0: never. None: before and after training, when there are at
            most 100,000 images to classify.
        epochs: Length of the training.
        use_pred: Compare the outputs of the prediction head.
        disabled_reason: Why there are no images to classify, for the summary of the run.
    """

    def __init__(
        self,
        images: PartlyLabelled,
        validation: Validation | None,
        recipe: Recipe,
        temperature: float,
        every_epochs: int | None,
        epochs: int,
        device: torch.device,
        num_workers: int = 0,
        bad_images: BadImages | None = None,
        use_pred: bool = False,
        disabled_reason: str = "there are no labelled images",
    ):
        self.images, self.validation, self.recipe, self.temperature = images, validation, recipe, temperature
        self.every_epochs, self.epochs, self.device, self.num_workers = every_epochs, epochs, device, num_workers
        self.bad_images, self.use_pred = bad_images, use_pred
        self.disabled_reason = disabled_reason if validation is None else None
        if validation is not None and every_epochs is None and len(validation.rows) > AUTOMATIC_UP_TO:
            self.disabled_reason = (
                f"there are {len(validation.rows):,} images to classify; ask for it with --eval_knn_freq"
            )

    def is_due(self, epoch: int) -> bool:
        """Whether to evaluate after ``epoch`` (-1: before training)."""
        if self.disabled_reason is not None:
            return False
        ends = epoch in (-1, self.epochs - 1)
        return ends or (self.every_epochs is not None and (epoch + 1) % self.every_epochs == 0)

    def run(self, encoder: Encoder, between_batches: Callable[[], None] | None = None) -> float:
        """Top-1 in percent.

        Args:
            between_batches: Called after every batch, equally often on every process; may raise to stop.
        """
        embed = partial(
            representations,
            encoder,
            recipe=self.recipe,
            device=self.device,
            use_pred=self.use_pred,
            num_workers=self.num_workers,
            between_batches=between_batches,
        )
        images, val = self.images, self.validation
        supports = embed(images.source, images.labelled)
        queries = embed(val.source, val.rows, bad_images=self.bad_images)
        labels = torch.from_numpy(images.labels[images.labelled]).to(supports.device)
        probabilities = classify(queries, supports, labels, len(images.classes), self.temperature)
        return top_k(probabilities, val.labels)[0]


def build_snn_monitor(
    args: argparse.Namespace,
    images: PartlyLabelled,
    recipe: Recipe,
    device: torch.device,
    num_workers: int,
    on_bad_image: str,
    use_pred: bool = False,
) -> SNNMonitor:
    """The monitor that the flags of a training ask for; says why when there is none.

    Args:
        args: Those of :mod:`paws.training_flags`.
        on_bad_image: ``replace`` or ``error``, for the images to classify.

    Raises:
        ValueError: If it was asked for and there are no images to classify.
    """
    validation, reason, bad_images = None, "--eval_knn_freq 0", None
    if args.eval_knn_freq != 0:
        try:
            validation = open_validation(images, args.data_path, args.val_path, args.allow_absolute_paths)
        except NotLabelled as error:
            if args.eval_knn_freq:
                raise ValueError(f"--eval_knn_freq {args.eval_knn_freq}: {error}") from error
            reason = str(error)
    if validation is not None:
        listed = Path(args.output_dir) / "bad_images_val.txt"
        bad_images = BadImages(len(validation.source), listed, on_bad_image, args.max_bad_fraction)
    monitor = SNNMonitor(
        images,
        validation,
        recipe,
        args.temperature,
        args.eval_knn_freq,
        args.epochs,
        device,
        num_workers,
        bad_images,
        use_pred,
        reason,
    )
    if monitor.disabled_reason is None:
        distributed.print_once(f"evaluation: {validation.describe()}")
    else:
        distributed.print_once(f"no evaluation between epochs: {monitor.disabled_reason}")
    return monitor


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Device and launcher flags of the evaluations."""
    add = parser.add_argument_group("processes").add_argument
    add("--dist_url", default="env://", help="rendezvous of the processes")
    add("--local_rank", "--local-rank", type=int, default=0, help="ignored: read from the environment")


def print_accuracies(what: str, probabilities: Tensor, labels: Tensor) -> tuple[float, float]:
    """Print and return top-1 and top-5."""
    top1, top5 = top_k(probabilities, labels)
    distributed.print_once(f"{what}: top-1 {top1:.2f} %, top-5 {top5:.2f} %")
    return top1, top5
