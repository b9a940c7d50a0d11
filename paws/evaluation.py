"""Classification with the labelled images as supports: the classifier, representations of images, an evaluation."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import distributed
from shared.evaluation.features import extract_features
from shared.evaluation.frozen import bad_images_of
from shared.evaluation.knn_monitor import AUTOMATIC_UP_TO, BetweenEpochs
from shared.evaluation.without_labels import MeasuresWithoutLabels, Pixels
from shared.images.labelled import NotLabelled, match_val, open_val
from shared.images.loading import LEFT_OUT, BadImages, EvalDataset, EvalTransform
from shared.images.sources import ImageSource, reading
from shared.networks.backbones import input_channels
from shared.run.run import Run

from .augmentations import Recipe
from .flags import recipe_of_run
from .heads import Encoder
from .hub import load_encoder
from .labels import PartlyLabelled, open_images
from .losses import soft_nearest_neighbours

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
    """Images whose classes are known and were not used: all of a source, or some of its rows.

    Attributes:
        absent: Classes of the labels that ``--shared_classes_only`` leaves out: they are not predicted.
        bad_images: What happens to those that cannot be read; by default the first one is an error.
    """

    source: ImageSource
    rows: np.ndarray
    absent: list[int] = field(default_factory=list)
    bad_images: BadImages | None = None

    def dataset(self, transform: EvalTransform) -> EvalDataset:
        return EvalDataset(self.source, transform, self.bad_images, self.rows.tolist())

    def top_k(self, probabilities: Tensor, labels: Tensor) -> tuple[float, float]:
        """:func:`top_k` of probabilities (N, C) for labels (N,)."""
        absent = torch.tensor(self.absent, dtype=torch.long, device=probabilities.device)
        return top_k(probabilities.index_fill(1, absent, -1), labels)

    def describe(self) -> str:
        which = "" if len(self.rows) == len(self.source) else " without a label in training"
        return f"{len(self.rows):,} images{which} of {self.source.name}"


def open_validation(
    images: PartlyLabelled,
    data_path: str | None,
    val_path: str | None,
    shared_classes_only: bool | None = None,
    **reading_options,
) -> Validation:
    """Images to classify: those of :func:`shared.images.labelled.open_val`, else those whose labels were kept back.

    Raises:
        NotLabelled: If there are none.
        ValueError: If they cannot be opened or have other classes.
    """
    if val_path is None and images.truth is None:
        raise NotLabelled("the classes of the unlabelled images are not known; give labelled ones as --val_path")
    val = open_val(data_path, val_path, **reading_options)
    if val is None and len(images.unlabelled) == 0:
        raise NotLabelled("all images have a label that is used; give others to classify as --val_path")
    if val is None:
        return Validation(images.source, images.unlabelled)
    val, absent = match_val(images, val, shared_classes_only)
    return Validation(val, np.arange(len(val)), absent)


def validation_of(args: argparse.Namespace, images: PartlyLabelled, list_path: Path | None = None) -> Validation:
    """What the flags name, see :func:`open_validation`; images that cannot be read are listed in ``list_path``."""
    shared = getattr(args, "shared_classes_only", None)
    validation = open_validation(images, args.data_path, args.val_path, shared, **reading(args))
    validation.bad_images = bad_images_of(args, validation.source, list_path)
    return validation


# --- Classifier -------------------------------------------------------------------------------------------------------


class Representation(nn.Module):
    """What evaluations compare: ``h``, or ``z`` with ``use_pred``; shares the encoder's weights."""

    def __init__(self, encoder: Encoder, use_pred: bool = False):
        super().__init__()
        self.encoder, self.use_pred = encoder, use_pred

    def forward(self, images: Tensor) -> Tensor:
        h, z = self.encoder(images)
        return z if self.use_pred else h


def eval_transform(recipe: Recipe, encoder: Encoder) -> EvalTransform:
    """Resize, crop the centre, normalise, for the channels that the encoder takes."""
    side, _ = recipe.large
    return EvalTransform(recipe.eval_resize_px, side, recipe.mean, recipe.std, input_channels(encoder), "bilinear")


@dataclass
class SoftNearestNeighbours:
    """Classifies images by the vote of the labelled ones, which are seen as centre crops without augmentation.

    Attributes:
        images: Their labelled ones are the supports.
        temperature: Of the softmax over similarities.
        use_pred: Compare the outputs of the prediction head.
        batch_size: Images per process in one pass.
    """

    images: PartlyLabelled
    recipe: Recipe
    temperature: float
    device: torch.device
    num_workers: int = 0
    use_pred: bool = False
    batch_size: int = 128

    def classify(
        self,
        encoder: Encoder,
        dataset: EvalDataset,
        between_batches: Callable[[], None] | None = None,
        of_pixels: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Class probabilities (N, C) of a data set, and its labels (N,); every process must call this.

        Labelled images that cannot be read have no vote, unless the policy of the data set says that they are an error.

        Args:
            between_batches: Called after every batch, equally often on every process; may raise to stop.
            of_pixels: Raw pixels vote instead of representations.
        """
        network = Pixels() if of_pixels else Representation(encoder, self.use_pred).train(encoder.training)
        chosen = self.images.labelled
        policy = "error" if dataset.bad_images.on_bad_image == "error" else "skip"
        policy = BadImages(len(self.images.source), None, policy, dataset.bad_images.max_fraction)
        labelled = EvalDataset(self.images.source, eval_transform(self.recipe, encoder), policy, chosen.tolist())
        (supports, found), (queries, labels) = (
            extract_features(
                network, part, self.device, self.batch_size, self.num_workers, between_batches=between_batches
            )
            for part in (labelled, dataset)
        )
        readable, num_classes = found != LEFT_OUT, len(self.images.classes)
        support_labels = torch.from_numpy(self.images.labels[chosen]).to(supports.device)[readable]
        return classify(queries, supports[readable], support_labels, num_classes, self.temperature), labels


def open_classifier(args: argparse.Namespace) -> tuple[Encoder, SoftNearestNeighbours]:
    """The encoder and the classifier that the flags of a program name which trains nothing."""
    device = distributed.init(args.dist_url, args.device)
    recipe, images = recipe_of_run(args), open_images(args)
    encoder = load_encoder(args.model_name, args.pretrained, args.use_pred).to(device)
    how = args.temperature, device, args.num_workers, args.use_pred, args.batch_size
    return encoder, SoftNearestNeighbours(images, recipe, *how)


# --- Between epochs ---------------------------------------------------------------------------------------------------


@dataclass
class SNNMonitor(BetweenEpochs):
    """Top-1 of the soft nearest neighbours between epochs, and measures without labels.

    Attributes:
        validation: What is classified; None: nothing is.
        every_epochs: Evaluate after every so many epochs, and before and after training; None: only then.
        epochs: Length of the training.
        disabled_reason: Why there is no evaluation, or None.
        without_labels: Of all training images.
    """

    classifier: SoftNearestNeighbours
    validation: Validation | None
    every_epochs: int | None
    epochs: int
    disabled_reason: str | None
    without_labels: MeasuresWithoutLabels | None = None

    def measure_without_labels(self, run: Run, encoder: nn.Module) -> None:
        """Let :meth:`evaluate` do so too, unless there are to be no evaluations."""
        if self.every_epochs != 0:
            transform = eval_transform(self.classifier.recipe, distributed.unwrap(encoder))
            source, num_workers = self.classifier.images.source, self.classifier.num_workers
            self.without_labels = MeasuresWithoutLabels(run, transform, num_workers, source)

    def evaluate(self, epoch: int, encoder: nn.Module, run: Run) -> None:
        """Log what is due after ``epoch`` (-1: before training); every process must call this."""
        values = {}
        if self.without_labels:
            plain = distributed.unwrap(encoder)
            values = self.without_labels.run(epoch, Representation(plain).train(plain.training))
        if self.is_due(epoch):
            values["snn_top1"] = self.run(encoder, run.stop_if_asked)
            if epoch == -1 and len(self.validation.rows) <= AUTOMATIC_UP_TO:
                values["pixels_snn_top1"] = self.run(encoder, run.stop_if_asked, of_pixels=True)
        if values:
            run.log_evaluation(**values)

    def run(
        self, encoder: Encoder, between_batches: Callable[[], None] | None = None, of_pixels: bool = False
    ) -> float:
        """Top-1 in percent; see :meth:`SoftNearestNeighbours.classify`."""
        encoder = distributed.unwrap(encoder)
        dataset = self.validation.dataset(eval_transform(self.classifier.recipe, encoder))
        return self.validation.top_k(*self.classifier.classify(encoder, dataset, between_batches, of_pixels))[0]


def build_snn_monitor(args: argparse.Namespace, classifier: SoftNearestNeighbours) -> SNNMonitor:
    """The monitor that the flags of a training ask for; says why when there is none.

    Args:
        args: Those of :mod:`paws.flags`.

    Raises:
        ValueError: If it was asked for and there are no images to classify.
    """
    validation, reason = None, "--eval_knn_freq 0"
    if args.eval_knn_freq != 0:
        try:
            validation = validation_of(args, classifier.images, Path(args.output_dir) / "bad_images_val.txt")
        except NotLabelled as error:
            if args.eval_knn_freq:
                raise ValueError(f"--eval_knn_freq {args.eval_knn_freq}: {error}") from error
            reason = str(error)
    if validation is not None:
        many = args.eval_knn_freq is None and len(validation.rows) > AUTOMATIC_UP_TO
        reason = f"there are {len(validation.rows):,} images to classify; ask for it with --eval_knn_freq"
        reason = reason if many else None
    what = f"no evaluation between epochs: {reason}" if reason else f"evaluation: {validation.describe()}"
    distributed.print_once(what)
    return SNNMonitor(classifier, validation, args.eval_knn_freq, args.epochs, reason)
