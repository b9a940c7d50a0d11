"""Multi-label classification on Pascal VOC 2007: its images, the training of a classifier on crops, its test."""

import argparse
import math
import os
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from xml.etree.ElementTree import parse

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torchvision.datasets import VOCDetection
from torchvision.transforms.functional import ten_crop

from shared.images.loading import LEFT_OUT, EpochBatchSampler, EvalDataset, EvalTransform, make_loader
from shared.images.sources import FileSource
from shared.images.views import ViewRecipe
from shared.multicrop import MultiCropDataset, normalize_views
from shared.networks.card import Card
from shared.run import randomness
from shared.run.flags import add_bad_image_flags, bool_flag

from .flags import add_process_flags
from .frozen import bad_images_of

CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor".split()
)
TEST_SPLIT = {"train": "val", "trainval": "test"}
IGNORED = 255
BATCH_SIZE, MOMENTUM, LARGEST_GRADIENT_NORM = 16, 0.9, 10
CROPS = 10
LOG_EVERY = 100  # steps


def add_voc_flags(parser: argparse.ArgumentParser, folder_flag: str, nit: int, stepsize: int, seed: int) -> None:
    """The folder, and what :func:`classify_voc` looks at."""
    add = parser.add_argument
    add(folder_flag, default="", help="folder VOC2007, with ImageSets/Main, Annotations and JPEGImages")
    add("--split", default="train", choices=tuple(TEST_SPLIT), help="images to learn from; tested on val or test")
    add("--fc6_8", type=bool_flag, default=True, help="the convolutional part stays as it is")
    add("--eval_random_crops", type=bool_flag, default=True, help="ten random crops; false: corners and centre")
    add("--nit", type=int, default=nit, help="training steps")
    add("--stepsize", type=int, default=stepsize, help="steps after which the learning rate is halved")
    add("--lr", type=float, default=0.003, help="learning rate at the start")
    add("--wd", type=float, default=1e-6, help="weight decay (the value itself)")
    add("--seed", type=int, default=seed)
    add_bad_image_flags(add, "error", "skip")
    add_process_flags(parser, launcher=False, num_workers=4)


def open_splits(folder: str, split: str, flag: str) -> dict[str, "VOCImages"]:
    """The split to learn from, and the one to test on."""
    return {name: VOCImages(Path(folder), name, flag) for name in (split, TEST_SPLIT[split])}


def classify_voc(
    network: nn.Module,
    convolutional: nn.Module,
    parameters: list[nn.Parameter],
    splits: dict[str, "VOCImages"],
    recipe: ViewRecipe,
    args: argparse.Namespace,
    device: torch.device,
    card: Card,
) -> dict[str, float]:
    """Train on the first split, then print and return the mean average precision in percent on every one.

    Args:
        network: Maps images of ``recipe.size_px`` pixels to a score for each class.
        convolutional, parameters: See :func:`train`.
        recipe: Of the crops.
        args: ``nit``, ``stepsize``, ``lr``, ``wd``, ``seed``, ``eval_random_crops``, ``num_workers`` and the flags of
            :func:`shared.run.flags.add_bad_image_flags`.
    """
    train(network, convolutional, parameters, next(iter(splits.values())), recipe, args, device, card)
    results = {}
    for split, images in splits.items():
        scores = crop_scores(network, images, recipe, args, device, card)
        precisions = average_precisions(scores, images.labels)
        results[split] = 100 * float(np.nanmean(precisions))
        for name, precision in zip(CLASSES, precisions, strict=True):
            print(f"{split} {name}: {100 * precision:.2f} %")
        unread = int(np.isnan(scores).all(axis=1).sum())
        note = f" (without {unread} of {len(scores)} images)" if unread else ""
        print(f"{split} mAP: {results[split]:.2f} %{note}", flush=True)
    return results


class VOCImages:
    """Images of a split of VOC 2007 and which classes they show, read by torchvision.

    Args:
        flag: Of the folder, for messages.

    Attributes:
        source: The images.
        labels: (N, 20), int64: 1 shown, 0 not shown, 255 shown by objects marked as difficult only.

    Raises:
        ValueError: If the folder has another layout or lacks the split.
    """

    def __init__(self, vocdir: Path, split: str, flag: str = "--vocdir"):
        folder = Path(os.path.abspath(vocdir))
        if folder.parts[-2:] != ("VOCdevkit", "VOC2007") or not folder.is_dir():
            raise ValueError(f"{flag} {vocdir}: expected a folder that ends in VOCdevkit/VOC2007")
        if not (folder / "ImageSets" / "Main" / f"{split}.txt").is_file():
            raise ValueError(f"{flag} {vocdir}: has no ImageSets/Main/{split}.txt")
        reader = VOCDetection(str(folder.parents[1]), year="2007", image_set=split)
        self.source = FileSource(f"VOC 2007 {split}", folder, reader.images)
        self.labels = np.array([_labels(reader.parse_voc_xml(parse(file).getroot())) for file in reader.annotations])


def _labels(annotation: dict) -> list[int]:
    """Label of each class in an image's annotation."""
    all_difficult: dict[str, bool] = {}
    for thing in annotation["annotation"].get("object", []):
        is_difficult = thing.get("difficult", "0") == "1"
        all_difficult[thing["name"]] = all_difficult.get(thing["name"], True) and is_difficult
    return [0 if name not in all_difficult else IGNORED if all_difficult[name] else 1 for name in CLASSES]


# --- Training ---------------------------------------------------------------------------------------------------------


def train(
    network: nn.Module,
    convolutional: nn.Module,
    parameters: list[nn.Parameter],
    images: VOCImages,
    recipe: ViewRecipe,
    args: argparse.Namespace,
    device: torch.device,
    card: Card,
) -> None:
    """``args.nit`` steps of SGD; the learning rate is halved every ``args.stepsize`` steps.

    Args:
        convolutional: The part of the network whose batch norms keep the statistics of the pre-training.
        parameters: What learns.

    Raises:
        ValueError: If the loss or its gradient is not finite; seen when a line is printed.
    """
    optimizer = torch.optim.SGD(parameters, args.lr, MOMENTUM, weight_decay=args.wd)
    labels = torch.from_numpy(images.labels)
    totals = torch.zeros(2, device=device)  # loss, norm of its gradient
    batches = endless_batches(images, recipe, args, device, card)
    for step, (views, indices) in enumerate(islice(batches, args.nit)):
        if step > 0 and step % args.stepsize == 0:
            for group in optimizer.param_groups:
                group["lr"] /= 2
        randomness.seed_step(args.seed, step)  # dropout
        network.train()
        convolutional.eval()
        loss = multilabel_loss(network(views), labels[indices].to(device, non_blocking=True))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT_NORM)
        optimizer.step()
        totals += torch.stack([loss.detach(), norm])
        if (step + 1) % LOG_EVERY == 0 or step + 1 == args.nit:
            mean, length = (totals / (step % LOG_EVERY + 1)).tolist()
            if not math.isfinite(mean + length):
                raise ValueError(f"up to step {step + 1} the loss is {mean}, its gradient {length}; try a smaller --lr")
            print(f"step {step + 1} of {args.nit}: loss {mean:.4f}", flush=True)
            totals.zero_()


def endless_batches(
    images: VOCImages, recipe: ViewRecipe, args: argparse.Namespace, device: torch.device, card: Card
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised random crops (B, 3, H, W) and their indices, epoch after epoch in a new order."""
    batch_size = min(BATCH_SIZE, len(images.source))
    sampler = EpochBatchSampler(len(images.source), batch_size, args.seed, drop_last=False)
    dataset = MultiCropDataset(images.source, [recipe], args.seed, bad_images=bad_images_of(args, images.source))
    loader = make_loader(dataset, batch_sampler=sampler, num_workers=args.num_workers, device=device)
    for epoch in count():
        sampler.set_epoch(epoch)
        for views, _, indices in loader:
            yield normalize_views(views, device, card.mean, card.std)[0], indices


def multilabel_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy summed over the classes that are not ignored, mean over the images.

    Args:
        scores: (B, 20).
        labels: (B, 20): 0, 1, or 255 for ignored.
    """
    counts = labels != IGNORED
    losses = F.binary_cross_entropy_with_logits(scores, labels.where(counts, 0).float(), reduction="none")
    return (losses * counts).sum() / len(scores)


# --- Testing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def crop_scores(
    network: nn.Module,
    images: VOCImages,
    recipe: ViewRecipe,
    args: argparse.Namespace,
    device: torch.device,
    card: Card,
) -> np.ndarray:
    """Sum of the scores of ten crops, (N, 20); NaN for images that cannot be read.

    They are random ones or, without ``args.eval_random_crops``, the corners, the centre and their mirror images.
    """
    network.eval()
    scores, bad_images = torch.zeros(len(images.source), len(CLASSES)), bad_images_of(args, images.source)
    if not args.eval_random_crops:
        dataset = EvalDataset(images.source, TenCrops(recipe.size_px), bad_images)
        loader = make_loader(dataset, batch_size=1, num_workers=args.num_workers, device=device)
        for i, (crops, labels, _) in enumerate(loader):
            (views,) = normalize_views([crops[0]], device, card.mean, card.std)
            scores[i] = torch.nan if labels[0] == LEFT_OUT else network(views).sum(dim=0).cpu()
        return scores.numpy()
    times_read = torch.zeros(len(scores))  # less often than others: never; more often: for one that cannot be read
    dataset = MultiCropDataset(images.source, [recipe], args.seed, bad_images=bad_images)
    sampler = EpochBatchSampler(len(images.source), 1, args.seed, drop_last=False)
    loader = make_loader(dataset, batch_sampler=sampler, num_workers=args.num_workers, device=device)
    for crop in range(CROPS):
        sampler.set_epoch(-1 - crop)  # draws that training has not seen
        for views, _, indices in loader:
            scores[indices] += network(normalize_views(views, device, card.mean, card.std)[0]).cpu()
            times_read[indices] += 1
    scores[times_read != CROPS] *= (CROPS / times_read[times_read != CROPS])[:, None]
    return scores.numpy()


def average_precisions(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Average precision of each class, in [0, 1]; NaN where no image shows it.

    Of equal scores, images that do not show the class come first.

    Args:
        scores: (N, classes); NaN: not scored.
        labels: (N, classes): 0, 1, or 255 for ignored.
    """
    precisions = []
    for score, label in zip(scores.T, labels.T, strict=True):
        counts = (label != IGNORED) & ~np.isnan(score)
        score, label = score[counts], label[counts]
        precisions.append(average_precision_score(label, score - 1e-5 * label) if label.any() else np.nan)
    return np.array(precisions)


class TenCrops:
    """The four corners, the centre, and the mirror images of the five: pixels to (10, C, size, size)."""

    def __init__(self, size_px: int, in_chans: int = 3):
        side = round(size_px * 256 / 224)
        self.size_px = size_px
        self.centre = EvalTransform(side, side, in_chans=in_chans, interpolation="bilinear")

    def __call__(self, pixels) -> Tensor:
        return torch.stack(ten_crop(self.centre(pixels), [self.size_px, self.size_px]))
