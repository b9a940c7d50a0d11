"""Parameter groups, optimisers, gradient clipping and moving averages."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def param_groups_no_decay_on_bias_and_norm(module: nn.Module) -> list[dict]:
    """Two groups of the trainable parameters: with weight decay, and without (biases and all 1-D tensors)."""
    decayed, plain = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (plain if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


def decay_groups(
    network: nn.Module, not_decayed: Sequence[str], decay: float, head_decay: float | None = None
) -> list[dict]:
    """Groups with the decay of the body's matrices, with that of the classifier's, and without; empty ones left out.

    Args:
        not_decayed: Parts of the names of parameters of more than one dimension that do not decay either.
        head_decay: Of ``head.*``; by default ``decay``.
    """
    groups = [{"params": [], "weight_decay": value} for value in (decay, head_decay, 0.0)]
    for name, parameter in network.named_parameters():
        is_plain = parameter.dim() < 2 or any(part in name for part in not_decayed)
        has_own = head_decay is not None and name.startswith("head.")
        groups[2 if is_plain else int(has_own)]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def build_optimizer(name: str, groups: list[dict]) -> torch.optim.Optimizer:
    """Optimiser whose learning rate and weight decay are written into its groups at every step.

    Args:
        name: ``"adamw"`` (torch's betas and epsilon), ``"sgd"`` (momentum 0.9) or ``"lars"``.
        groups: Parameter groups; a group without ``weight_decay`` starts at 0.

    Raises:
        ValueError: If the name is another one.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
        _start_momentum(optimizer)
        return optimizer
    if name == "lars":
        return LARS(groups, lr=0.0)
    raise ValueError(f"unknown optimizer {name!r}: choose adamw, sgd or lars")


def _start_momentum(optimizer: torch.optim.SGD) -> None:
    """Give every tensor without a momentum one of 0, which makes the same update.

    torch's fused SGD fails when a tensor gets its first gradient later than others (a frozen last layer), and keeps
    garbage when the first step is left out.
    """
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if optimizer.state[p].get("momentum_buffer") is None:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a state dict into an optimiser of :func:`build_optimizer`, also one that another implementation wrote.

    Published checkpoints come from optimisers that are not fused and may lack the state of a frozen layer; only the
    fused ones can leave a step out on the device.
    """
    own = [{k: group[k] for k in ("fused", "foreach") if k in group} for group in optimizer.param_groups]
    groups = [saved | mine for saved, mine in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    if isinstance(optimizer, torch.optim.SGD):
        _start_momentum(optimizer)


def keep_options(optimizer: torch.optim.Optimizer, options: list[dict], but: tuple[str, ...]) -> None:
    """Set the options of each parameter group to ``options`` again, those named in ``but`` left out."""
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update({name: value for name, value in own.items() if name not in ("params", *but)})


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) with momentum; 1-D tensors get plain momentum SGD.

    Each other tensor's gradient ``g + weight_decay * p`` is scaled by
    ``eta * |p| / |g + weight_decay * p|``, or not at all where either norm is 0.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        weight_decay: Not applied to 1-D tensors.
        momentum: Weight of the old update.
        eta: Trust coefficient.
    """

    _step_supports_amp_scaling = True  # like torch's fused optimisers: `found_inf` skips the step on the device

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.9, eta: float = 0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        if closure is not None:
            raise ValueError("LARS takes no closure")
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad if grad_scale is None else p.grad / grad_scale
                if p.ndim != 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    p_norm, update_norm = p.norm(), update.norm()
                    trust = group["eta"] * p_norm / update_norm
                    update = update * torch.where((p_norm > 0) & (update_norm > 0), trust, 1.0)
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                mu = group["momentum"] * state["mu"] + update
                if found_inf is None:
                    state["mu"].copy_(mu)
                    p.sub_(mu, alpha=group["lr"])
                else:
                    skip = found_inf.bool()
                    state["mu"].copy_(torch.where(skip, state["mu"], mu))
                    p.copy_(torch.where(skip, p, p - group["lr"] * mu))


def clip_grad_norm_per_tensor_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales every gradient tensor on its own to a norm of at most ``max_norm``, in place.

    Args:
        parameters: Those without a gradient are left out.
        max_norm: Cap of each tensor's L2 norm; 0 measures only.

    Returns:
        Norms before clipping, shape ``(number of gradients,)``; reading them does not wait for the device.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(grads)
    stacked = torch.stack(norms)
    if max_norm > 0:
        coefficients = (max_norm / (stacked + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, list(coefficients.unbind()))
    return stacked


def clip_total_grad_norm_(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Clip the norm of all gradients together, in place; the norm before, which is not finite if any gradient is not.

    Args:
        max_norm: None: no clipping.
    """
    parameters = [p for p in parameters if p.grad is not None]
    if max_norm is not None:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    return nn.utils.get_total_norm([p.grad for p in parameters])


def step_unless_not_finite(optimizer: torch.optim.Optimizer, grad_norms: Tensor) -> Tensor:
    """One optimiser step, left out as a whole (moments included) when a gradient holds an infinity or a NaN.

    With an optimiser that can leave a step out itself, as those of :func:`build_optimizer` and torch's fused ones can,
    the decision is taken where the gradients are and nothing waits for a GPU; with another one the host reads it.

    Args:
        optimizer: Any.
        grad_norms: Norms of all gradients, from a function of this module that clips them.

    Returns:
        1.0 where the step was left out, else 0.0 (0-d float32 tensor on the gradients' device).
    """
    skip = (~grad_norms.isfinite()).any().float()
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if skip == 0:
            optimizer.step()
        return skip
    optimizer.found_inf = skip
    try:
        optimizer.step()
        return optimizer.found_inf
    finally:
        del optimizer.found_inf


@torch.no_grad()
def ema_update_(averages: Iterable[Tensor], values: Iterable[Tensor], momentum: float) -> None:
    """``averages = momentum * averages + (1 - momentum) * values``, in place."""
    torch._foreach_lerp_(list(averages), list(values), 1.0 - momentum)
