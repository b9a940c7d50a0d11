"""The asynchronous parallel linear map (section 2.2): every transfer overlaps with a product.

y = x A^T for x (..., inputs) and A (outputs, inputs), both x and y shared out over the processes of a group along their
last dimension. A is shared too:

- by its columns: each process multiplies its x with its columns, output shard by output shard; sums of these products
  travel round the ring, and each process adds its own. An output shard is what is sent.
- by its rows: the shards of x travel round the ring, and each process multiplies each with the columns that belong to
  it. A shard of x is what is sent.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def cheaper_way(inputs: int, outputs: int) -> str:
    """How to share a matrix so that less is sent: ``rows`` of one that expands, else ``columns``."""
    return "rows" if outputs > inputs else "columns"


def partial_products(x_shards: Tensor, weight: Tensor) -> Tensor:
    """What the processes add up: shard (P, ..., inputs / P) by shard times its columns: (P, ..., outputs)."""
    columns = weight.chunk(len(x_shards), dim=1)
    return torch.stack([F.linear(x, part) for x, part in zip(x_shards, columns, strict=True)])


def ring_linear(x: Tensor, weight: Tensor, by: str, group: dist.ProcessGroup | None = None) -> Tensor:
    """This process's shard (..., outputs / P) of y = x A^T; gradients of x and A are exact and travel the same ring.

    Args:
        x: Shard of this process, (..., inputs / P).
        weight: Its part of A: (outputs, inputs / P) by ``columns``, (outputs / P, inputs) by ``rows``.
        by: How A is shared.
        group: The processes; None: all.

    Raises:
        ValueError: If the sizes cannot be shared evenly.
    """
    world = dist.get_world_size(group)
    shared, what = (len(weight), "outputs") if by == "columns" else (weight.shape[1], "inputs")
    if by not in ("columns", "rows") or shared % world:
        raise ValueError(f"{shared} {what} by {by!r} cannot be shared by {world} processes")
    return (_ByColumns if by == "columns" else _ByRows).apply(x, weight, group)


class _Ring:
    """Sends to the next process and receives from the one before it; ``wait`` returns what has come."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group, self.rank, self.world = group, dist.get_rank(group), dist.get_world_size(group)
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.next, self.before = ranks[(self.rank + 1) % self.world], ranks[(self.rank - 1) % self.world]

    def pass_on(self, tensor: Tensor) -> None:
        self.sent, self.received = tensor.contiguous(), torch.empty_like(tensor, memory_format=torch.contiguous_format)
        operations = [dist.P2POp(dist.isend, self.sent, self.next, self.group)]
        operations.append(dist.P2POp(dist.irecv, self.received, self.before, self.group))
        self.requests = dist.batch_isend_irecv(operations)

    def wait(self) -> Tensor:
        for request in self.requests:
            request.wait()
        return self.received


def _sum_of_products(x: Tensor, parts: tuple[Tensor, ...], ring: _Ring) -> Tensor:
    """Each process r gets the sum over the processes of x times their ``parts[r]`` (inputs / P, outputs / P)."""
    total = x @ parts[(ring.rank - 1) % ring.world]
    for hop in range(1, ring.world):
        ring.pass_on(total)
        product = x @ parts[(ring.rank - 1 - hop) % ring.world]  # meanwhile
        total = ring.wait() + product
    return total


def _each_shard(x: Tensor, ring: _Ring, use: Callable[[int, Tensor], object]) -> None:
    """Call ``use(r, shard)`` with the shard of every process r, while the next one is on its way."""
    for hop in range(ring.world):
        if hop + 1 < ring.world:
            ring.pass_on(x)
        use((ring.rank - hop) % ring.world, x)
        if hop + 1 < ring.world:
            x = ring.wait()


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """(..., a), (..., b) -> (a, b), summed over the rest."""
    return left.flatten(0, -2).T @ right.flatten(0, -2)


class _ByColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, group) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ring = ring = _Ring(group)
        return _sum_of_products(x, weight.T.chunk(ring.world, dim=1), ring)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        rows, products, weight_grads = weight.chunk(ctx.ring.world), [], {}

        def use(r: int, shard: Tensor) -> None:
            products.append(shard @ rows[r])
            weight_grads[r] = _outer(shard, x)

        _each_shard(grad, ctx.ring, use)
        return sum(products[1:], products[0]), torch.cat([weight_grads[r] for r in range(len(rows))]), None


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, group) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ring = ring = _Ring(group)
        parts, products = weight.T.chunk(ring.world), []
        _each_shard(x, ring, lambda r, shard: products.append(shard @ parts[r]))
        return sum(products[1:], products[0])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        x_grad = _sum_of_products(grad, weight.chunk(ctx.ring.world, dim=1), ctx.ring)
        weight_grads: dict[int, Tensor] = {}
        _each_shard(x, ctx.ring, lambda r, shard: weight_grads.update({r: _outer(grad, shard)}))
        return x_grad, torch.cat([weight_grads[r] for r in range(ctx.ring.world)], dim=1), None
