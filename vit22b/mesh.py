"""Training one network on a mesh of devices with two axes (section 2.2).

Along the model axis each process has some heads and MLP channels of every block (tensor parallelism, with tokens shared
out between the blocks); along the data axis parameters, gradients and moments are shared out (FSDP2), and so are the
images. Both are torch's own: ``DTensor`` redistributes tokens, ``fully_shard`` weights. Neighbouring ranks are a row of
the model axis.

A checkpoint has the names, tensors and order of one process, so that a run can go on with any mesh, and without one.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from shared import distributed
from shared.optimisation.optim import clip_total_grad_norm_, keep_options

from .scaled_vit import ScaledViT, Share


def open_mesh(data: int, model: int, device: torch.device) -> DeviceMesh:
    """All processes as a mesh ``data`` x ``model``; every process must call this.

    Raises:
        ValueError: If there are not as many processes, or only one.
    """
    if data * model != (world := distributed.get_world_size()) or world == 1:
        alone = "; one needs no --mesh" if world == 1 else ""
        raise ValueError(f"--mesh {data} {model} is of {data * model} processes, and there are {world}{alone}")
    return init_device_mesh(device.type, (data, model), mesh_dim_names=("data", "model"))


class MeshShare(Share):
    """What a process of the mesh has of every block, and how it talks to its row of the model axis."""

    def __init__(self, mesh: DeviceMesh):
        self.mesh, self.axis = mesh, mesh["model"]
        super().__init__(self.axis.get_local_rank(), self.axis.size())

    def _change(self, x: Tensor, before: Placement, after: Placement, gradients: Placement | None = None) -> Tensor:
        if self.count == 1:
            return x
        tokens = DTensor.from_local(x, self.axis, [before], run_check=False).redistribute(placements=[after])
        return tokens.to_local(grad_placements=gradients and [gradients])

    def gather(self, x: Tensor) -> Tensor:
        return self._change(x, Shard(1), Replicate(), Partial())

    def reduce(self, x: Tensor) -> Tensor:
        return self._change(x, Partial(), Shard(1))

    def all_tokens(self, x: Tensor) -> Tensor:
        return self._change(x, Shard(1), Replicate())

    def own_tokens(self, x: Tensor) -> Tensor:
        return self._change(x, Replicate(), Shard(1))

    def images_of_row(self, *tensors: Tensor) -> list[Tensor]:
        """Tensors of all processes of the row, which work on the same images, joined on dimension 0."""
        if self.count == 1:
            return list(tensors)
        gathered = [torch.empty_like(t).repeat(self.count, *[1] * (t.dim() - 1)) for t in tensors]
        for parts, tensor in zip(gathered, tensors, strict=True):
            dist.all_gather(list(parts.chunk(self.count)), tensor.contiguous(), group=self.axis.get_group())
        return gathered


class OwnImages(nn.Module):
    """The network for code that gives every process its own images, equally many: it returns what belongs to them."""

    def __init__(self, network: ScaledViT):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        share = self.network.share
        (joined,) = share.images_of_row(images)
        return self.network(joined).chunk(share.count)[share.index]


def build_on_mesh(build: Callable[..., ScaledViT], mesh: DeviceMesh, device: torch.device) -> ScaledViT:
    """A network on a mesh with the initial values that it would have on one process.

    ``build`` takes ``share``. No process holds more than one whole parameter at a time, and its share of the others.

    Raises:
        ValueError: If the mesh does not divide heads, channels, tokens or the width.
    """
    with torch.device("meta"):
        network = build(share=MeshShare(mesh))
    share, width = network.share, network.patches.bias.numel()
    if width % mesh["data"].size():
        raise ValueError(f"a width of {width} cannot be divided among {mesh['data'].size()}, the data axis of the mesh")
    for name, value in list(network.initial_values()):
        owner, _, last = name.rpartition(".")
        placement: Placement = Replicate()
        if pieces := network.pieces(name):
            placement = Shard(pieces[0])
            value = value.index_select(pieces[0], share.rows(pieces[1])).chunk(share.count, pieces[0])[share.index]
        held = DTensor.from_local(value.to(device).clone(), mesh["model"], [placement], run_check=False)
        setattr(network.get_submodule(owner), last, nn.Parameter(held))
    shard = partial(fully_shard, mesh=mesh["data"], shard_placement_fn=_along_data_axis)
    for block in network.blocks:
        shard(block)
    shard(network)
    return network


def _along_data_axis(parameter: nn.Parameter) -> Shard:
    """The dimension that the data axis divides, which is not that of the model axis."""
    last = parameter.placements[0] == Shard(0) or len(parameter) == 1
    return Shard(parameter.dim() - 1 if last else 0)


def clip_gradients_(network: ScaledViT, max_norm: float | None) -> Tensor:
    """:func:`shared.optimisation.optim.clip_total_grad_norm_` of a network on a mesh or of one process.

    The norm is that of the whole gradients, and the same number on every process.
    """
    if not isinstance(network.share, MeshShare):
        return clip_total_grad_norm_(network.parameters(), max_norm)
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    held = [gradient.to_local() for gradient in gradients]
    # processes of a row of the model axis hold copies of what they do not share
    copies = [1 if isinstance(gradient.placements[-1], Shard) else network.share.count for gradient in gradients]
    squares = [part.double().square().sum() / count for part, count in zip(held, copies, strict=True)]
    norm = distributed.all_reduce_sum(torch.stack(squares).sum()).sqrt().to(held[0].dtype)
    if max_norm is not None:
        torch._foreach_mul_(held, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


# --- Checkpoints ------------------------------------------------------------------------------------------------------


class OnMesh:
    """The network of a run as its checkpoints hold it: whole tensors, on rank 0. Every process makes the same calls."""

    def __init__(self, network: ScaledViT):
        self.network = network
        self.named = dict(network.named_parameters())

    def whole(self, name: str, tensor: DTensor) -> Tensor:
        """A parameter, its gradient or its moments on the CPU, in the order of one process; empty but on rank 0."""
        full = tensor.full_tensor().detach()
        if not distributed.is_main_process():
            return full.new_empty(0)
        if pieces := self.network.pieces(name):
            full = full.index_select(pieces[0], self.network.share.rows(pieces[1]).argsort().to(full.device))
        return full.cpu()

    def part(self, name: str, full: Tensor) -> DTensor:
        """The way back, of whole tensors on every process; ``ValueError`` for those of another shape."""
        like = self.named[name]
        if full.shape != like.shape:
            raise ValueError(f"{name} is {tuple(full.shape)}, and {tuple(like.shape)} in this run")
        if pieces := self.network.pieces(name):
            full = full.index_select(pieces[0], self.network.share.rows(pieces[1]).to(full.device))
        for axis, placement in enumerate(like.placements):
            if isinstance(placement, Shard):
                parts = full.chunk(like.device_mesh.size(axis), placement.dim)
                rank = like.device_mesh.get_local_rank(axis)
                full = parts[rank] if rank < len(parts) else full.narrow(placement.dim, 0, 0)
        held = full.to(like.device, like.dtype).contiguous().clone()
        return DTensor.from_local(
            held, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {name: self.whole(name, parameter) for name, parameter in self.named.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if different := sorted(state.keys() ^ self.named.keys()):
            raise ValueError(f"another layout: {', '.join(different[:4])} is not in both")
        for name, full in state.items():
            self.named[name].to_local().copy_(self.part(name, full).to_local())


class OptimizerOnMesh:
    """The same for the moments of its optimiser, whose options are those of the flags but for ``scheduled``."""

    def __init__(self, optimizer: torch.optim.Optimizer, network: OnMesh, scheduled: tuple[str, ...]):
        self.optimizer, self.network, self.scheduled = optimizer, network, scheduled
        names = {parameter: name for name, parameter in network.named.items()}
        self.names = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]

    def _mapped(self, state: dict, change: Callable[[str, Tensor], Tensor]) -> dict:
        moments = {
            i: {key: value if key == "step" else change(self.names[i], value) for key, value in values.items()}
            for i, values in state["state"].items()
        }
        return state | {"state": moments}

    def state_dict(self) -> dict:
        return self._mapped(self.optimizer.state_dict(), self.network.whole)

    def load_state_dict(self, state: dict) -> None:
        own = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(self._mapped(state, self.network.part))
        keep_options(self.optimizer, own, but=self.scheduled)
