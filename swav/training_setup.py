"""What SwAV and DeepCluster-v2 set up in the same way: the network, and the layout of checkpoints."""

import argparse

import torch
from torch import nn

from shared import distributed
from shared.networks.batchnorm import synchronize_batchnorm

from .networks import build_network

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


def tell_about_defaults(args: argparse.Namespace, embedded: dict) -> None:
    """Print which flags have other defaults without ``--data_path``."""
    if args.data_path is None:
        names = " ".join(f"--{name}" for name in embedded)
        distributed.print_once(f"without --data_path these flags have defaults for the embedded data: {names}")


def to_official(state: dict) -> dict:
    """The state of a run under the names of the official checkpoints, whose networks are wrapped for processes."""
    network = {f"module.{name}": value for name, value in state["network"].items()}
    return {"state_dict": network} | {name: value for name, value in state.items() if name != "network"}


def from_official(checkpoint: dict) -> dict:
    """The way back; official checkpoints have no counts of prototypes, and their queue is another file."""
    state = {"network" if name == "state_dict" else name: value for name, value in checkpoint.items()}
    return state | {name: checkpoint.get(name) or {} for name in ("queue", "prototype_usage")}
