"""What a training of DeepCluster starts from: its images, and everything that a checkpoint holds."""

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
from shared.optimisation.precision import Precision
from shared.run.checkpoint import check_flags, load_latest, restore, resume_position
from shared.run.log import RunLog
from shared.run.not_finite import FiniteGuard

from .augmentations import centre_crop, random_crop
from .backbones import fill_network, official_names
from .clustering import Clusters, check_clustering
from .networks import ClusterNetwork, new_top_layer
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


def find_checkpoint(output_dir: Path, resume: str) -> dict | None:
    """The newest checkpoint in ``output_dir``, else the one of ``--resume``; None: start from scratch.

    Raises:
        ValueError: If ``--resume`` is not there.
    """
    checkpoint = load_latest(output_dir / CHECKPOINT)
    if checkpoint is None and resume:
        checkpoint = load_latest(resume)
        if checkpoint is None:
            raise ValueError(f"--resume {resume}: there is no such file")
        checkpoint.pop("log", None)  # its lines are in another folder
    return checkpoint


@dataclass
class Resumable:
    """The parts of a training that every checkpoint holds.

    Attributes:
        network: Without a top layer.
        optimizer: Of the network.
        guard: Set once the network is loaded, for it remembers the running statistics.
        evaluated_before: Whether the evaluation before training is done.
        clusters: Of the epoch ``clustered_epoch``; None before the first clustering.
        top_layer: For ``clusters``.
    """

    args: argparse.Namespace
    data: TrainingData
    network: ClusterNetwork
    optimizer: torch.optim.SGD
    precision: Precision
    log: RunLog
    guard: FiniteGuard | None = None
    evaluated_before: bool = False
    clusters: Clusters | None = None
    clustered_epoch: int = -1
    top_layer: nn.Linear | None = None

    def state(self, epoch: int, step_in_epoch: int) -> dict:
        """Where to go on and with what; the first keys are those of the official checkpoints."""
        weights = official_names(self.network.state_dict())
        if self.top_layer is not None:
            weights |= {f"top_layer.{name}": value for name, value in self.top_layer.state_dict().items()}
        return {
            "epoch": epoch,
            "arch": self.args.arch,
            "state_dict": weights,
            "optimizer": self.optimizer.state_dict(),
            "args": vars(self.args),
            "fp16_scaler": self.precision.scaler.state_dict(),
            "step_in_epoch": step_in_epoch,
            "skipped_steps": int(self.guard.in_a_row),
            "batch_size": self.args.batch,
            "world_size": distributed.get_world_size(),
            "images": self.data.checksum,
            "evaluated_before": self.evaluated_before,
            "clustered_epoch": self.clustered_epoch,
            "clusters": self.clusters and vars(self.clusters),
            "log": self.log.state_dict(),
        }

    def load(self, checkpoint: dict) -> tuple[int, int]:
        """Take everything from a checkpoint, ours or an official one; returns the epoch and the step in it to go on at.

        Raises:
            ValueError: If it was written with another network.
        """
        if "args" in checkpoint:  # the official checkpoints have none
            check_flags(checkpoint, self.args, NETWORK_FLAGS)
        saved_top_layer = fill_network(self.network, checkpoint, self.args.arch, "the checkpoint")
        restore_momentum(checkpoint, self.optimizer)
        position = resume_position(checkpoint, self.args.batch, self.data.checksum, self.args.on_changed_run)
        if checkpoint.get("fp16_scaler"):
            self.precision.scaler.load_state_dict(checkpoint["fp16_scaler"])
        if "log" in checkpoint:
            self.log.load_state_dict(checkpoint["log"])
        self.evaluated_before = checkpoint.get("evaluated_before", False)
        if checkpoint.get("images") == self.data.checksum and checkpoint["clusters"]:  # else those of other images
            self.clusters = Clusters(**checkpoint["clusters"])
            self.clustered_epoch = checkpoint["clustered_epoch"]
            self.top_layer = new_top_layer(self.network.dim, self.clusters.num_clusters).to(self.precision.device)
            self.top_layer.load_state_dict(saved_top_layer)
        distributed.print_once("resuming at epoch {}, step {}".format(*position))
        return position


def restore_momentum(checkpoint: dict, optimizer: torch.optim.SGD) -> None:
    """Take the momentum from a checkpoint; learning rate and weight decay stay as the flags say."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    restore(checkpoint, optimizer=optimizer)
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
