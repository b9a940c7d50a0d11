"""A large batch in the memory of a small one."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from shared import distributed

from .precision import autocast_again


def add_accumulation_flag(add: Callable) -> None:
    """``--accumulate``, with the ``add_argument`` of a group."""
    pieces = "pass a batch through the backbone in so many pieces: less memory, one more forward pass, the same update"
    add("--accumulate", type=int, default=1, help=pieces)


def accumulate(network: nn.Module, pieces: int) -> None:
    """Let a network, or its method ``forward_backbone`` if it has one, take batches in pieces; in place.

    A piece's activations are dropped after its forward pass and made again in the backward pass, one piece at a time,
    while the gradients add up. Outputs of the whole batch meet before the loss: unlike gradients of separate losses,
    these are those of the whole batch also where a loss couples its images (Sinkhorn-Knopp, contrast, centring,
    batch norms in a head). Two things differ from a batch in one piece: batch norms within the network normalise each
    piece by its own statistics, and random numbers (stochastic depth, masks) are drawn piece by piece.

    Args:
        network: Maps images (B, ...), or a list of batches (one per resolution), to rows in the same order; tensors of
            B rows beside them are cut alike. To be called after ``compile_network``.
        pieces: Of about equal size; 1 leaves the network as it is. A resolution has at least so many images.

    Raises:
        ValueError: If ``pieces`` is less than 1; in a step, if a batch has fewer rows than that.
    """
    if pieces < 1:
        raise ValueError(f"--accumulate {pieces} is less than 1")
    if pieces == 1:
        return
    method = "forward_backbone" if hasattr(network, "forward_backbone") else "forward"
    setattr(network, method, InPieces(network, getattr(network, method), pieces))
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        distributed.print_once(f"--accumulate {pieces}: batch norms of the backbone normalise each piece by itself")


class InPieces:
    """``forward`` of a network on one piece of a batch after the other, see :func:`accumulate`."""

    def __init__(self, network: nn.Module, forward: Callable, pieces: int):
        self.network, self.forward, self.pieces = network, forward, pieces

    def __call__(self, images: Tensor | list[Tensor], *others, **options):
        if not torch.is_grad_enabled():  # there is nothing to save
            return self.forward(images, *others, **options)
        batches = [images] if isinstance(images, Tensor) else images
        if (fewest := min(map(len, batches))) < self.pieces:
            raise ValueError(f"--accumulate {self.pieces}: a batch of {fewest} cannot be cut into so many pieces")
        cut = [batch.tensor_split(self.pieces) for batch in batches]
        beside = [self._cut(other, len(batches[0])) for other in others]
        outputs = []  # of each piece, by resolution
        for piece, *arguments in zip(zip(*cut, strict=True), *beside, strict=True):
            features = checkpoint(
                self.forward,
                piece[0] if isinstance(images, Tensor) else list(piece),
                *arguments,
                use_reentrant=False,
                context_fn=self._contexts,
                **options,
            )
            outputs.append(features.split([len(part) for part in piece]))
        return torch.cat([part for resolution in zip(*outputs, strict=True) for part in resolution])

    def _cut(self, value, rows: int) -> Sequence:
        """What each piece of a batch of so many rows gets of ``value``."""
        in_rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
        return value.tensor_split(self.pieces) if in_rows else [value] * self.pieces

    def _contexts(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """Of the first and the second forward pass of a piece."""
        return contextlib.nullcontext(), self._again(autocast_again())

    @contextlib.contextmanager
    def _again(self, autocast: contextlib.AbstractContextManager) -> Iterator[None]:
        """Does not count a piece's statistics in the running ones a second time."""
        norms = [module for module in self.network.modules() if isinstance(module, _BatchNorm)]
        before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked = norm.num_batches_tracked.clone()
        try:
            with autocast:
                yield
        finally:
            for norm, (momentum, count) in zip(norms, before, strict=True):
                norm.momentum, norm.num_batches_tracked = momentum, count
