"""Evaluations of a frozen network: what k-NN and linear probes of every folder that has a card have in common."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from shared import distributed
from shared.images.labelled import open_labelled
from shared.images.loading import BadImages, EpochBatchSampler, EvalDataset, EvalTransform, make_loader
from shared.images.sources import ImageSource
from shared.images.views import ViewRecipe
from shared.multicrop import MultiCropDataset, normalize_views
from shared.networks.backbones import input_channels
from shared.networks.card import Card
from shared.networks.weights import safe_load

from .features import extract_features
from .knn import knn_accuracies

FEATURE_FILES = ("trainfeat.pth", "testfeat.pth", "trainlabels.pth", "testlabels.pth")

# --- Images -----------------------------------------------------------------------------------------------------------


def labelled_sources(
    data_path: str | None, val_path: str | None, allow_absolute_paths: bool = False, **asked: int | None
) -> tuple[ImageSource, ImageSource]:
    """Train and val images with classes.

    Args:
        asked: By the flag's name, what the train images must suffice for: ``nb_knn``, the most neighbours; any other
            one, the outputs of a classifier (``num_labels``, ``num_classes``).

    Raises:
        ValueError: If there are none, or too few for that.
    """
    train, val = open_labelled(data_path, val_path, allow_absolute_paths)
    for flag, number in asked.items():
        if flag == "nb_knn" and number > len(train):
            raise ValueError(f"--nb_knn {number} is more than the {len(train)} images of {train.name}")
        if flag != "nb_knn" and number is not None and number < len(train.classes):
            raise ValueError(f"--{flag} {number} is less than the {len(train.classes)} classes of {train.name}")
    return train, val


def eval_transform(card: Card, image_size: int, network: nn.Module) -> EvalTransform:
    """Resize (256 for a crop of 224), crop the centre, normalise, for the channels that the network takes."""
    resize_px = round(image_size * 256 / 224)
    return EvalTransform(resize_px, image_size, card.mean, card.std, input_channels(network), card.interpolation)


# --- k-NN -------------------------------------------------------------------------------------------------------------


def add_vote_flags(parser: argparse.ArgumentParser):
    """Flags of a k-NN classification; returns the ``add_argument`` of their group."""
    add = parser.add_argument_group("vote").add_argument
    add("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours; 20 is usually best")
    add("--temperature", type=float, default=0.07, help="divides the similarities")
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="of the similarities")
    return add


def train_and_val_features(
    network: nn.Module,
    sources: Sequence[ImageSource],
    transform: EvalTransform,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    store_on: torch.device | str | None = None,
) -> tuple[Tensor, ...]:
    """Normalised features and labels of each source, in turn, the same on every process."""
    found = []
    for source in sources:
        distributed.print_once(source.describe())
        dataset = EvalDataset(source, transform)
        features, labels = extract_features(network, dataset, device, batch_size, num_workers, store_on)
        found += [F.normalize(features, dim=1), labels]
    return tuple(found)


def print_knn(
    features: tuple[Tensor, ...], nb_knn: Sequence[int], temperature: float, precision: str
) -> dict[int, tuple[float, float]] | None:
    """Classify the val images; ``{k: (top-1, top-5)}`` in percent on rank 0."""
    if not distributed.is_main_process():
        return None
    with torch.inference_mode():
        accuracies = knn_accuracies(*features, nb_knn, temperature, precision=precision)
    for k, (top1, top5) in accuracies.items():
        print(f"{k}-NN classifier result: Top1: {top1:.2f}, Top5: {top5:.2f}", flush=True)
    return accuracies


def write_features(folder: Path, features: tuple[Tensor, ...]) -> None:
    """Train features, val features, train labels, val labels, one file each."""
    folder.mkdir(parents=True, exist_ok=True)
    train_features, train_labels, val_features, val_labels = features
    for name, tensor in zip(FEATURE_FILES, (train_features, val_features, train_labels, val_labels), strict=True):
        torch.save(tensor.cpu(), folder / name)


def read_features(folder: Path, device: torch.device | str) -> tuple[Tensor, ...]:
    """What :func:`write_features` wrote."""
    missing = [name for name in FEATURE_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"--load_features {folder}: no {', '.join(missing)} in it")
    train_features, val_features, train_labels, val_labels = (
        safe_load(folder / name, map_location=device) for name in FEATURE_FILES
    )
    return train_features, train_labels.long(), val_features, val_labels.long()


# --- Linear probe -----------------------------------------------------------------------------------------------------


def train_crops(
    source: ImageSource,
    recipe: ViewRecipe,
    batch_size: int,
    seed: int,
    in_chans: int,
    bad_images: BadImages,
    num_workers: int,
    device: torch.device,
    drop_single: bool = False,
) -> tuple[DataLoader, EpochBatchSampler]:
    """Random views of this process's share of the images, and the sampler that wants to know the epoch.

    Args:
        drop_single: Leave out the last batch of an epoch if it is a single image, which batch norms that see one pixel
            cannot normalise.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    per_rank = -(-len(source) // world_size)
    drop_last = drop_single and per_rank > 1 and per_rank % batch_size == 1
    sampler = EpochBatchSampler(len(source), batch_size, seed, rank, world_size, drop_last)
    dataset = MultiCropDataset(source, [recipe], seed, in_chans=in_chans, bad_images=bad_images)
    return make_loader(dataset, batch_sampler=sampler, num_workers=num_workers, device=device), sampler


def on_device(card: Card, loader: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images and labels, with a progress bar on a terminal."""
    hidden = not (distributed.is_main_process() and sys.stderr.isatty())
    for views, labels, _ in tqdm(loader, leave=False, disable=hidden):
        yield normalize_views(views, device, card.mean, card.std)[0], labels.to(device, non_blocking=True)
