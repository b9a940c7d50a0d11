"""What a training of DeepCluster starts from: its images, and the layout of its checkpoints."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from shared import distributed
from shared.evaluation.features import RankSampler
from shared.images.cache import cache_images
from shared.images.loading import BadImages, EvalDataset, make_loader, short_side
from shared.images.sources import ImageSource, open_source
from shared.multicrop import MultiCropDataset
from shared.run.checkpoint import load_latest

from .augmentations import centre_crop, random_crop
from .backbones import official_names, plain_names
from .clustering import Clusters, check_clustering
from .networks import new_top_layer
from .sampling import DrawnBatches

CHECKPOINT = "checkpoint.pth.tar"
NETWORK_FLAGS = ("arch", "sobel", "crop_size")


@dataclass
class TrainingData:
    """The training images: as centre crops for clustering and as random crops for training.

    Attributes:
        checksum: Of the images, the same on every process.
        batches: What ``train_loader`` loads; an epoch's draw is put into it.
        feature_loader: Yields this process's share of the images, in order.
    """

    source: ImageSource
    checksum: int
    bad_images: BadImages
    batches: DrawnBatches
    train_loader: DataLoader
    feature_loader: DataLoader

    @property
    def steps_per_epoch(self) -> int:
        return len(self.batches)

    @property
    def batch_size(self) -> int:
        return self.batches.batch_size


def open_training_data(args: argparse.Namespace, output_dir: Path, device: torch.device) -> TrainingData:
    """Open ``DIR`` and make its loaders.

    Raises:
        ValueError: If there are fewer images than clusters.
    """
    source = open_source(args.data_path, "train", allow_absolute_paths=args.allow_absolute_paths, flag="DIR")
    source = cache_images(source, args.cache)
    checksum = source.checksum()
    distributed.check_same_on_all_processes((len(source), checksum), "the training data (number of images, checksum)")
    check_clustering(len(source), args.clustering, args.nmb_cluster, args.kmeans)
    bad_images = BadImages(len(source), output_dir / "bad_images.txt", args.on_bad_image, args.max_bad_fraction)
    batches = DrawnBatches(int(args.reassign * len(source)), args.batch)
    train_loader = make_loader(
        MultiCropDataset(source, [random_crop(args.crop_size, args.crop_scale)], args.seed, bad_images=bad_images),
        batch_sampler=batches,
        num_workers=args.num_workers,
        device=device,
    )
    feature_loader = make_loader(
        EvalDataset(source, centre_crop(args.crop_size, normalized=False), bad_images),
        sampler=RankSampler(len(source)),
        batch_size=args.batch // distributed.get_world_size(),
        num_workers=args.num_workers,
        device=device,
    )
    distributed.print_once(f"{source.describe()}: {len(batches)} steps per epoch")
    if args.data_path is not None and (side := short_side(source)) < args.crop_size:
        distributed.print_once(
            f"images of {side} pixels are smaller than --crop_size {args.crop_size}: they are enlarged"
        )
    return TrainingData(source, checksum, bad_images, batches, train_loader, feature_loader)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def find_checkpoint(path: Path, resume: str) -> dict:
    """The newest checkpoint of the run, else the one of ``--resume``, else an empty one: start from scratch.

    Args:
        path: Of the newest checkpoint of the run.

    Raises:
        ValueError: If ``--resume`` is not there.
    """
    checkpoint = load_latest(path)
    if checkpoint is None and resume:
        checkpoint = load_latest(resume)
        if checkpoint is None:
            raise ValueError(f"--resume {resume}: there is no such file")
        checkpoint.pop("log", None)  # its lines are in another folder
    return checkpoint or {}


class ClusteringState:
    """The clusters of an epoch and their top layer, which checkpoints hold.

    Args:
        dim: Of the features.
        images: Checksum of the training images; clusters of other images are not taken over.
        device: Of the top layer.

    Attributes:
        evaluated_before: Whether the evaluation before training is done.
        epoch: That of the clusters.
        clusters: None before the first clustering.
        top_layer: For ``clusters``.
    """

    evaluated_before = False
    epoch = -1
    clusters: Clusters | None = None
    top_layer: nn.Linear | None = None

    def __init__(self, dim: int, images: int, device: torch.device):
        self.dim, self.images, self.device = dim, images, device

    def state_dict(self) -> dict:
        return {
            "evaluated_before": self.evaluated_before,
            "clustered_epoch": self.epoch,
            "clusters": self.clusters and vars(self.clusters),
            "top_layer": {} if self.top_layer is None else self.top_layer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.evaluated_before = state["evaluated_before"]
        if state["images"] == self.images and state["clusters"]:
            self.epoch, self.clusters = state["clustered_epoch"], Clusters(**state["clusters"])
            self.top_layer = new_top_layer(self.dim, self.clusters.num_clusters).to(self.device)
            self.top_layer.load_state_dict(state["top_layer"])


def to_official(state: dict) -> dict:
    """The state of a run under the names of the official checkpoints."""
    clustering = state.pop("clustering")
    top_layer = {f"top_layer.{name}": value for name, value in clustering.pop("top_layer").items()}
    weights = official_names(state.pop("network")) | top_layer
    return state | clustering | {"arch": state["args"]["arch"], "state_dict": weights}


def from_official(checkpoint: dict) -> dict:
    """The way back; official files have neither flags nor clusters.

    Raises:
        ValueError: If the file is of something else.
    """
    if not {"arch", "state_dict"} <= checkpoint.keys():
        raise ValueError("no checkpoint of DeepCluster: it has no 'arch' or no 'state_dict'")
    weights = plain_names(checkpoint["state_dict"])
    top_layer = {name: weights.pop(name) for name in list(weights) if name.startswith("top_layer.")}
    clustering = {"evaluated_before": True, "clustered_epoch": -1, "clusters": None, "images": None}
    clustering = {name: checkpoint.get(name, without) for name, without in clustering.items()}
    clustering["top_layer"] = {name.removeprefix("top_layer."): value for name, value in top_layer.items()}
    flags = {"arch": checkpoint["arch"], "sobel": "sobel.0.weight" in weights}
    return {"args": flags} | checkpoint | {"network": weights, "clustering": clustering}
