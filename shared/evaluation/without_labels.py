"""Two measures of features that need no labels, of a network and of raw pixels.

What lines of ``metrics.jsonl`` say of at most 200 images:

- ``recall_at_1``: percent that are found again from a mirrored crop of half of what evaluations see of them: the
  feature of the crop is compared with those of all images whole, after what all crops, or all wholes, have in common is
  taken away (each dimension has mean 0 and variance 1). ``recall_chance``: that of a guess, 100 / N. Mirrored, because
  random weights find a crop by its very pixels. A network that brings the images of a cluster together loses it.
- ``rankme``: exp of the entropy of the normalised singular values of the features of whole images (RankMe, Garrido et
  al. 2023): an effective rank, at most N.
- ``pixels_recall_at_1``, ``pixels_rankme``: the same of pixels, averaged to 16 x 16; in the first line only.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import distributed
from shared.images.labelled import open_val
from shared.images.loading import BadImages, EvalDataset, EvalTransform
from shared.images.sources import ImageSource, open_source, reading
from shared.run.health import rank_me
from shared.run.randomness import derive_seed
from shared.run.run import Run

from .features import extract_features
from .knn import nearest_neighbours

MOST_IMAGES = 200  # two standard errors of 7 points at most
MOST_TIMES = 50  # in a run
SHARE = 0.5  # of the area
PIXELS_SIDE = 16


class MeasuresWithoutLabels:
    """Recall of images from their crops, and RankMe, between the epochs of a run.

    The images are those of ``--val_path``, else the val part of ``--data_path``, else images that the training sees.

    Args:
        run: Its flags lead to the images.
        transform: What the network sees of an image.
        source: Other images, which the training sees.

    Attributes:
        images: At most 200, evenly spaced over their source.
        name: Of these images, for the log.
    """

    def __init__(self, run: Run, transform: EvalTransform, num_workers: int = 0, source: ImageSource | None = None):
        args = run.args
        self.every_epochs, self.device, self.num_workers = -(-args.epochs // MOST_TIMES), run.device, num_workers
        self.epochs, self.between_batches = args.epochs, run.stop_if_asked
        held_out = open_val(args.data_path, args.val_path, **reading(args)) if source is None else None
        source = held_out or source or open_source(args.data_path, "train", **reading(args))
        rows = np.linspace(0, len(source) - 1, min(MOST_IMAGES, len(source))).astype(int).tolist()
        listed = run.output_dir / ("bad_images_val.txt" if held_out else "bad_images.txt")
        bad_images = BadImages(len(source), listed, args.on_bad_image, args.max_bad_fraction)
        self.images = ImageAndCrop(source, transform, bad_images, rows)
        seen = "held out" if held_out else "which the training sees too; --val_path names others"
        self.name = f"{len(rows)} images of {source.name}"
        distributed.print_once(f"measures without labels: {self.name}, {seen}")

    def run(self, epoch: int, backbone: nn.Module) -> dict[str, float]:
        """What is due after ``epoch`` (-1: before training); every process must call this."""
        if not (epoch in (-1, self.epochs - 1) or (epoch + 1) % self.every_epochs == 0):
            return {}
        network = BesidePixels(backbone)
        with torch.random.fork_rng(devices=[]):  # loaders draw numbers
            rows, _ = extract_features(
                network, self.images, self.device, 64, self.num_workers, between_batches=self.between_batches
            )
        whole, crops = rows.unflatten(1, (2, -1)).unbind(1)
        values = {"recall_chance": 100 / len(rows)}
        for prefix, columns in network.parts(whole.shape[1], self.images.transform.in_chans).items():
            if epoch == -1 or not prefix:
                values[f"{prefix}recall_at_1"] = recall_at_1(crops[:, columns], whole[:, columns])
                values[f"{prefix}rankme"] = rank_me(whole[:, columns]).item()
        return values


def recall_at_1(queries: Tensor, database: Tensor) -> float:
    """Percent of the rows of ``queries`` (N, D) to which the row of that number of ``database`` is the nearest one.

    By the cosine of features whose dimensions are standardised in each of the two sets.
    """
    queries, database = (F.normalize(_standardised(rows), dim=1) for rows in (queries, database))
    _, found = nearest_neighbours(queries, database, 1)
    return 100 * int((found[:, 0] == torch.arange(len(found), device=found.device)).sum()) / len(found)


def _standardised(rows: Tensor) -> Tensor:
    spread = rows.std(dim=0)
    return (rows - rows.mean(dim=0)) / spread.clamp_min(1e-3 * spread.mean() + 1e-12)


class ImageAndCrop(EvalDataset):
    """An image as evaluations see it, and a mirrored crop of half of that at the same size: (2, C, H, W).

    Where the crop lies depends on the index of the image and on nothing else.
    """

    def _read(self, index: int) -> tuple[Tensor, int, int]:
        pixels = self.source.load(index).decode()
        near = copy.copy(self.transform)
        near.resize_px = near.crop_px
        seen = min(pixels.shape[:2]) * near.crop_px / self.transform.resize_px
        side = max(1, round(seen * SHARE**0.5))
        top, left = (
            round((length - seen) / 2) + derive_seed(index, axis) % max(1, int(seen) - side + 1)
            for axis, length in enumerate(pixels.shape[:2])
        )
        crop = np.fliplr(pixels[top : top + side, left : left + side]).copy()
        return torch.stack([self.transform(pixels), near(crop)]), self.source.label(index), index


class Pixels(nn.Module):
    """Raw pixels of images (B, C, H, W), averaged to 16 x 16: (B, C x 256), float32."""

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.float(), PIXELS_SIDE).flatten(1)


class BesidePixels(nn.Module):
    """Features, and behind them raw pixels, of images (B, C, H, W), or of groups of them: (B, G, C, H, W)."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone, self.pixels = backbone, Pixels()
        self.train(backbone.training)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(0, -4)
        return torch.cat([self.backbone(flat).float(), self.pixels(flat)], dim=1).reshape(len(images), -1)

    @staticmethod
    def parts(columns: int, channels: int) -> dict[str, slice]:
        """Where features and pixels lie in a row of so many columns, of images of so many channels."""
        dim = columns - channels * PIXELS_SIDE**2
        return {"": slice(dim), "pixels_": slice(dim, None)}
