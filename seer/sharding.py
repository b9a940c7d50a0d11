"""Fully sharded training (FSDP2): every process has a part of each tensor, and gathers a block while it computes it.

A checkpoint has the names and whole tensors of one process, so that a run goes on with any number of them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from shared import distributed
from shared.networks.batchnorm import synchronize_batchnorm

from .regnet import initialise_


def shard_network(network: nn.Module, parts: list[nn.Module], device: torch.device) -> nn.Module:
    """Share out a network on the meta device, and give it the initial values of one process.

    No process holds more than one whole tensor beside its parts.

    Args:
        parts: Modules that are gathered one at a time; the rest is gathered at once.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    network = synchronize_batchnorm(network, device)
    for part in parts:
        fully_shard(part, mesh=mesh)
    fully_shard(network, mesh=mesh)
    network.to_empty(device=device)
    return initialise_(network, fill)


def build_network(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """A network of one process, or of several that hold copies of it, with the same initial values."""
    with torch.device("meta"):
        network = build()
    network = synchronize_batchnorm(network, device)
    return distributed.wrap(initialise_(network.to_empty(device="cpu")).to(device), device)


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a tensor that every process has whole, shared out as ``like`` is."""
    if whole.shape != like.shape:
        raise ValueError(f"a tensor is {tuple(whole.shape)}, and {tuple(like.shape)} in this run")
    if not isinstance(like, DTensor):
        return whole
    whole = whole.to(like.device, like.dtype)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def fill(held: Tensor, whole: Tensor) -> None:
    """Put the values of a whole tensor where this process holds its part, or all, of them."""
    part = part_of(whole, held)
    if isinstance(held, DTensor):
        held, part = held.to_local(), part.to_local()
    held.copy_(part)


def whole_of(tensor: Tensor) -> Tensor:
    """A tensor as a checkpoint holds it: whole and on the CPU, on rank 0; empty on the others."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()
    return whole.cpu() if distributed.is_main_process() else whole.new_empty(0)


class WholeNetwork:
    """A sharded network as its checkpoints hold it. Every process makes the same calls."""

    def __init__(self, network: nn.Module):
        self.network = network

    def state_dict(self) -> dict[str, Tensor]:
        return {name: whole_of(value).detach() for name, value in self.network.state_dict().items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        own = self.network.state_dict()
        if different := sorted(state.keys() ^ own.keys()):
            raise ValueError(f"another layout: {', '.join(different[:4])} is not in both")
        for name, held in own.items():
            fill(held, state[name])


class WholeOptimizer:
    """The same for the momentum of its optimiser; its options are those of the flags."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def state_dict(self) -> dict:
        state = self.optimizer.state_dict()
        whole = {i: {key: whole_of(v) for key, v in values.items()} for i, values in state["state"].items()}
        return state | {"state": whole}

    def load_state_dict(self, state: dict) -> None:
        for i, values in state["state"].items():
            like = self.parameters[i]
            self.optimizer.state[like] = {key: part_of(value, like) for key, value in values.items()}
