"""What features are worth while a network trains: weighted k-NN with labels, and measures without any."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shared import distributed
from shared.images.labelled import NotLabelled, open_labelled
from shared.images.loading import LEFT_OUT, BadImages, EvalDataset, EvalTransform
from shared.images.sources import ImageSource, reading
from shared.run.run import Run

from .features import extract_features
from .knn import knn_classify
from .without_labels import PIXELS_SIDE, BesidePixels, MeasuresWithoutLabels, Pixels

NEIGHBOURS = 20
AUTOMATIC_UP_TO = 100_000  # images; beyond, an evaluation is worth asking for by flag


def classify_pixels(train: ImageSource, val: ImageSource, device: torch.device) -> float:
    """Top-1 in percent of the k-NN of raw pixels (centre crops of 32, averaged to 16 x 16); every process must call it.

    Images that cannot be read are left out.
    """
    transform, found = EvalTransform(2 * PIXELS_SIDE, 2 * PIXELS_SIDE), []
    for source in (train, val):
        images = EvalDataset(source, transform, BadImages(len(source), on_bad_image="skip", max_fraction=1))
        rows, labels = extract_features(Pixels(), images, device)
        found.append((rows[labels != LEFT_OUT], labels[labels != LEFT_OUT]))
    (known, labels), (asked, truth) = found
    mean = known.mean(dim=0)
    return knn_classify(known - mean, labels, asked - mean, truth, k=min(NEIGHBOURS, len(known)))[0]


class BetweenEpochs:
    """An evaluation between the epochs of a run, before and after it or more often."""

    every_epochs: int | None
    epochs: int
    disabled_reason: str | None

    def is_due(self, epoch: int) -> bool:
        """Whether to evaluate after ``epoch`` (-1: before training)."""
        if self.disabled_reason is not None:
            return False
        ends = epoch in (-1, self.epochs - 1)
        return ends or (self.every_epochs is not None and (epoch + 1) % self.every_epochs == 0)


class KNNMonitor(BetweenEpochs):
    """Evaluations between the epochs of a run: weighted k-NN on a validation split, and measures without labels.

    ``--eval_knn_freq`` classifies after every so many epochs; None before and after training, when there are at most
    100,000 images. The measures without labels come after every epoch, of long runs after 50 of them. With
    ``--eval_knn_freq 0`` there are neither. Lines of ``metrics.jsonl`` state what :mod:`.without_labels` names, in
    percent ``knn_top1`` and ``knn_chance``, and before training ``pixels_knn_top1``.

    Args:
        run: Its flags lead to the images; unreadable ones are listed in its folder, those of the val split in
            ``bad_images_val.txt``.
        image_size: Side in pixels of the centre crops.
        mean, std: For pixels in [0, 1].
        disabled_reason: Why ``--eval_knn_freq`` is 0, if that was not asked for.

    Attributes:
        transform: What the network sees of an image.
        sources: Labelled images to learn from and to classify, None without them or with ``--eval_knn_freq 0``.
        k: Neighbours.
        disabled_reason: Why there is no k-NN, or None.
        train, val: The images, where there is k-NN.
        without_labels: None with ``--eval_knn_freq 0``.

    Raises:
        ValueError: If evaluations were asked for and there are no labelled images.
    """

    def __init__(
        self,
        run: Run,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        num_workers: int = 0,
        disabled_reason: str = "--eval_knn_freq 0",
    ):
        args = run.args
        self.every_epochs, self.epochs = args.eval_knn_freq, args.epochs
        self.device, self.num_workers = run.device, num_workers
        self.log, self.between_batches = run.log_evaluation, run.stop_if_asked
        self.latest_features: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        resize_px = round(image_size * 256 / 224)  # the usual ratio of short side and crop
        self.transform = EvalTransform(resize_px, image_size, mean, std, getattr(args, "in_chans", 3))
        self.sources, self.k, self.disabled_reason = None, NEIGHBOURS, disabled_reason
        self.without_labels = None
        if self.every_epochs != 0:
            self.without_labels = MeasuresWithoutLabels(run, self.transform, num_workers)
            try:
                self.sources = open_labelled(args.data_path, args.val_path, **reading(args))
            except NotLabelled as error:
                if self.every_epochs:
                    raise ValueError(f"--eval_knn_freq {self.every_epochs}: {error}") from error
                self.disabled_reason = str(error)
        if self.sources:
            number = len(self.sources[0])
            self.k = min(NEIGHBOURS, number)
            many = self.every_epochs is None and number > AUTOMATIC_UP_TO
            self.disabled_reason = f"there are {number:,} images; ask for it with --eval_knn_freq" if many else None
        if self.disabled_reason:
            distributed.print_once(f"no k-NN evaluation: {self.disabled_reason}")
            return
        policy = args.on_bad_image, args.max_bad_fraction
        self.train, self.val = (
            EvalDataset(source, self.transform, BadImages(len(source), run.output_dir / listed, *policy))
            for source, listed in zip(self.sources, ("bad_images.txt", "bad_images_val.txt"), strict=True)
        )

    def evaluate(self, epoch: int, backbone: nn.Module) -> None:
        """Log what is due after ``epoch`` (-1: before training); every process must call this."""
        values = self.without_labels.run(epoch, backbone) if self.without_labels else {}
        if self.is_due(epoch):
            values |= self.run(backbone, with_pixels=epoch == -1 and len(self.train) <= AUTOMATIC_UP_TO)
        if values:
            self.log(**values)

    def features(self, backbone: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Train features, train labels, val features, val labels."""
        return tuple(
            tensor
            for dataset in (self.train, self.val)
            for tensor in extract_features(
                backbone, dataset, self.device, num_workers=self.num_workers, between_batches=self.between_batches
            )
        )

    def run(self, backbone: nn.Module, with_pixels: bool = False) -> dict[str, float]:
        """Top-1 in percent of the features, and of raw pixels too."""
        network = BesidePixels(backbone) if with_pixels else backbone
        train, train_labels, val, val_labels = self.features(network)
        parts = network.parts(train.shape[1], self.transform.in_chans) if with_pixels else {"": slice(None)}
        values = {"knn_chance": 100 / len(self.train.source.classes)}
        for prefix, columns in reversed(parts.items()):
            found = train[:, columns].contiguous(), train_labels, val[:, columns].contiguous(), val_labels
            values[f"{prefix}knn_top1"] = knn_classify(*found, k=self.k)[0]
        self.latest_features = found
        return values
