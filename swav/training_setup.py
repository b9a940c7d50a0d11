"""What SwAV and DeepCluster-v2 set up in the same way: the network, and all that a checkpoint holds."""

import argparse
from dataclasses import dataclass

import torch
from torch import nn

from shared import distributed
from shared.images.training_data import TrainingData
from shared.networks.batchnorm import synchronize_batchnorm
from shared.optimisation.precision import Precision
from shared.run.checkpoint import check_flags, restore, resume_position
from shared.run.log import RunLog
from shared.run.not_finite import FiniteGuard

from .hub import build_network
from .larc import LARC

NETWORK_FLAGS = ("arch", "in_chans", "feat_dim", "hidden_mlp", "nmb_prototypes", "crops_for_assign")
CHECKPOINT = "checkpoint.pth.tar"


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
