"""LARC: momentum SGD whose gradients are scaled tensor by tensor to a fraction of the weights' norm."""

from collections.abc import Iterable

import torch
from torch import Tensor

from shared import distributed


def local_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that several share (a ``DTensor``); any other one as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def tensor_norms(tensors: list[Tensor]) -> Tensor:
    """L2 norms of whole tensors, (n,); of those that all processes share the same numbers on each of them."""
    norms = torch.stack(torch._foreach_norm([local_part(tensor) for tensor in tensors]))
    if not hasattr(tensors[0], "to_local"):
        return norms
    return distributed.all_reduce_sum(norms.square()).sqrt()


def scaled_gradients(
    params: list[Tensor], weight_decay: float, trust_coefficient: float, eps: float, clip_lr: float | None = None
) -> list[Tensor]:
    """``r * (g + weight_decay * p)`` with ``r = trust_coefficient * |p| / (|g| + weight_decay * |p| + eps)``.

    Of a tensor p with gradient g of which either norm is 0: g itself, without decay.

    Args:
        params: All have a gradient.
        clip_lr: Learning rate; with it ``min(r / clip_lr, 1)`` in place of r: the scaling can only make steps smaller.

    Returns:
        What this process has of them.
    """
    grads = [p.grad for p in params]
    p_norms, g_norms = tensor_norms(params), tensor_norms(grads)
    params, grads = ([local_part(tensor) for tensor in tensors] for tensors in (params, grads))
    rates = trust_coefficient * p_norms / (g_norms + weight_decay * p_norms + eps)
    if clip_lr is not None:
        rates = (rates / clip_lr).clamp(max=1.0)
    adapted = (p_norms > 0) & (g_norms > 0)
    updates = torch._foreach_mul(grads, list(torch.where(adapted, rates, 1.0).unbind()))
    decays = torch.where(adapted, weight_decay * rates, 0.0)
    torch._foreach_add_(updates, torch._foreach_mul(params, list(decays.unbind())))
    return updates


def momentum_buffer(optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor:
    """That of ``torch.optim.SGD``; starting at 0 is the same update as starting with the first one."""
    state = optimizer.state[p]
    if state.get("momentum_buffer") is None:
        state["momentum_buffer"] = torch.zeros_like(p)
    return state["momentum_buffer"]


class LARC(torch.optim.Optimizer):
    """Layer-wise adaptive rate control (after You et al. 2017) around SGD with momentum.

    A tensor is updated with :func:`scaled_gradients` instead of its gradient. All tensors decay, biases and norms
    too. The state is that of ``torch.optim.SGD``, as in the official checkpoints. Where processes share parameters
    (FSDP2), all of them along dimension 0, norms are those of the whole tensors.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        weight_decay: Part of the gradient before it is scaled.
        momentum: Weight of the old update.
        trust_coefficient: Size of an update, before ``lr``, relative to that of its tensor.
        clip: See ``clip_lr`` of :func:`scaled_gradients`.
        eps: Keeps the scaling finite.
    """

    _step_supports_amp_scaling = True  # like torch's fused optimisers: `found_inf` skips the step on the device

    def __init__(
        self,
        params: Iterable,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        clip: bool = False,
        eps: float = 1e-8,
    ):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.trust_coefficient, self.clip, self.eps = trust_coefficient, clip, eps  # not in official checkpoints

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient; with ``found_inf`` set to 1 nothing changes."""
        if closure is not None:
            raise ValueError("LARC takes no closure")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, params: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        updates = scaled_gradients(params, weight_decay, self.trust_coefficient, self.eps, lr if self.clip else None)
        buffers = [local_part(momentum_buffer(self, p)) for p in params]
        params = [local_part(p) for p in params]
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, buffers, alpha=-lr)
            return
        # A step that is left out adds zeros to what it multiplies by 1, so that nobody has to wait for `found_inf`.
        skip = found_inf.bool()
        updates = [torch.where(skip, 0.0, update) for update in updates]
        torch._foreach_mul_(buffers, torch.where(skip, 1.0, momentum))
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(params, torch._foreach_mul(buffers, torch.where(skip, 0.0, -lr)))
