"""What SwAV and DeepCluster-v2 set up in the same way: processes, images, network, evaluation, resuming."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from shared import distributed, randomness
from shared.attempt import Attempt
from shared.batchnorm import synchronize_batchnorm
from shared.checkpoint import check_flags, restore, resume_position
from shared.data import BadImages, EpochBatchSampler, default_num_workers, make_loader, open_source, short_side
from shared.evaluation.knn_monitor import KNNMonitor, open_labelled
from shared.image_cache import cache_images
from shared.memory import keep_freed_memory
from shared.metrics import RunLog
from shared.multicrop import MultiCropDataset
from shared.not_finite import FiniteGuard
from shared.precision import Precision

from .augmentations import MEAN, STD, swav_views
from .larc import LARC
from .networks import build_network

NETWORK_FLAGS = ("arch", "in_chans", "feat_dim", "hidden_mlp", "nmb_prototypes", "crops_for_assign")
CHECKPOINT = "checkpoint.pth.tar"


def start(args: argparse.Namespace) -> tuple[torch.device, Path]:
    """Join the other processes, seed, and claim the output folder; returns this process's device and the folder."""
    device = distributed.init(args.dist_url, args.device, args.dist_timeout)
    keep_freed_memory()
    randomness.seed_everything(args.seed)
    output_dir = Path(args.output_dir)
    if distributed.is_main_process():
        (output_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        Attempt.current().claim(output_dir)
    distributed.barrier()
    return device, output_dir


@dataclass
class TrainingData:
    """The training images, and how they become batches of views on this process.

    Attributes:
        checksum: Of the images, the same on every process.
        batch_size: Images per step, on all processes.
    """

    dataset: MultiCropDataset
    sampler: EpochBatchSampler
    loader: DataLoader
    bad_images: BadImages
    checksum: int
    batch_size: int
    num_workers: int

    @property
    def steps_per_epoch(self) -> int:
        return len(self.sampler)


def open_training_data(args: argparse.Namespace, output_dir: Path, device: torch.device) -> TrainingData:
    """Open ``--data_path`` and make its loader."""
    source = open_source(args.data_path, "train", allow_absolute_paths=args.allow_absolute_paths)
    source = cache_images(source, args.cache)
    checksum = source.checksum()
    distributed.check_same_on_all_processes((len(source), checksum), "the training data (number of images, checksum)")
    recipes = swav_views(args.nmb_crops, args.size_crops, args.min_scale_crops, args.max_scale_crops, args.blur_radius)
    bad_images = BadImages(len(source), output_dir / "bad_images.txt", args.on_bad_image, args.max_bad_fraction)
    dataset = MultiCropDataset(source, recipes, args.seed, args.augmentation, args.in_chans, bad_images)
    world_size = distributed.get_world_size()
    sampler = EpochBatchSampler(len(source), args.batch_size, args.seed, distributed.get_rank(), world_size)
    num_workers = default_num_workers() if args.num_workers is None else args.num_workers
    loader = make_loader(dataset, batch_sampler=sampler, num_workers=num_workers, device=device)
    distributed.print_once(f"{source.describe()}: {len(sampler)} steps per epoch")
    if args.data_path is not None and (side := short_side(source)) < max(args.size_crops):
        distributed.print_once(
            f"images of {side} pixels are smaller than --size_crops {max(args.size_crops)}: views are enlarged"
        )
    batch_size = args.batch_size * world_size
    return TrainingData(dataset, sampler, loader, bad_images, checksum, batch_size, num_workers)


def build_student(args: argparse.Namespace, nmb_prototypes: int | list[int], device: torch.device) -> nn.Module:
    """The network with its heads, on this process's device and joined with those of the other processes."""
    network = build_network(
        args.arch,
        output_dim=args.feat_dim,
        hidden_mlp=args.hidden_mlp,
        nmb_prototypes=nmb_prototypes,
        normalize=True,
        img_size=args.size_crops[0],
        in_chans=args.in_chans,
    )
    if args.sync_bn != "none":
        network = synchronize_batchnorm(network, device, _batchnorm_group(args))
    network.to(device)
    if args.compile:
        network.forward_backbone = torch.compile(network.forward_backbone)
    return distributed.wrap(network, device)


def _batchnorm_group(args: argparse.Namespace) -> int | None:
    """Processes per group of ``--sync_bn apex``, or None for all; a small run is one group."""
    world_size = distributed.get_world_size()
    if args.sync_bn == "pytorch" or args.syncbn_process_group_size >= world_size:
        return None
    if args.syncbn_process_group_size < 1 or world_size % args.syncbn_process_group_size:
        raise ValueError(
            f"--syncbn_process_group_size {args.syncbn_process_group_size} does not divide {world_size} processes"
        )
    return args.syncbn_process_group_size


def build_knn_monitor(args: argparse.Namespace, output_dir: Path, device: torch.device, num_workers: int) -> KNNMonitor:
    """k-NN between epochs; says why when there is none.

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
        args.size_crops[0],
        MEAN,
        STD,
        args.eval_knn_freq,
        args.epochs,
        device,
        args.in_chans,
        num_workers,
        on_bad_image=args.on_bad_image,
        max_bad_fraction=args.max_bad_fraction,
        output_dir=output_dir,
    )
    if knn.off:
        distributed.print_once(f"no k-NN evaluation: {knn.off}")
    return knn


def numbered_checkpoint(epoch: int, epochs: int, checkpoint_freq: int) -> str | None:
    """Name under which the checkpoint of this epoch stays, as in the official code; None for most epochs."""
    due = checkpoint_freq > 0 and (epoch % checkpoint_freq == 0 or epoch == epochs - 1)
    return f"checkpoints/ckp-{epoch}.pth" if due else None


def patience_steps(total_steps: int, steps_per_epoch: int) -> int:
    """Steps before a verdict about a collapse: a quarter of the run, of a long one two epochs and a little more."""
    return min(total_steps // 4, 2 * steps_per_epoch + 1000)


@dataclass
class Resumable:
    """The parts of a training that every checkpoint holds.

    Attributes:
        guard: Set once the network is loaded, for it remembers the running statistics.
    """

    args: argparse.Namespace
    data: TrainingData
    network: nn.Module
    optimizer: LARC
    precision: Precision
    log: RunLog
    guard: FiniteGuard | None = None

    def state(self, epoch: int, step_in_epoch: int) -> dict:
        """Where to go on and with what; the first keys are those of the official checkpoints. For every rank."""
        network = distributed.unwrap(self.network)
        return {
            "epoch": epoch,
            "state_dict": {f"module.{name}": value for name, value in network.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "args": vars(self.args),
            "fp16_scaler": self.precision.scaler.state_dict(),
            "step_in_epoch": step_in_epoch,
            "skipped_steps": int(self.guard.in_a_row),
            "batch_size": self.data.batch_size,
            "world_size": distributed.get_world_size(),
            "images": self.data.checksum,
            "log": self.log.state_dict(),
        }

    def load(self, checkpoint: dict) -> tuple[int, int]:
        """Take everything from a checkpoint, ours or an official one; returns the epoch and the step in it to go on at.

        Raises:
            ValueError: If it was written with another network.
        """
        if "args" in checkpoint:  # the official checkpoints have none
            check_flags(checkpoint, self.args, NETWORK_FLAGS)
        restore(checkpoint, state_dict=distributed.unwrap(self.network))
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.args.wd
        if checkpoint.get("fp16_scaler"):
            self.precision.scaler.load_state_dict(checkpoint["fp16_scaler"])
        if "log" in checkpoint:
            self.log.load_state_dict(checkpoint["log"])
        position = resume_position(checkpoint, self.data.batch_size, self.data.checksum, self.args.on_changed_run)
        distributed.print_once("resuming at epoch {}, step {}".format(*position))
        return position
