"""LARS around momentum SGD as in the released code of PAWS, its parameter groups, the learning rate of every step."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from shared.optimisation.larc import momentum_buffer, scaled_gradients


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: decayed and scaled by LARS; biases and batch norms, which are neither.

    As in the released code a batch norm is known by "bn" in its name, which leaves the one in the shortcut of a ResNet
    (``downsample.1``) in the first group. In a network of a library, which has other names, all vectors are excluded.
    """
    adapted, excluded = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_library = name.removeprefix("module.").startswith("backbone.")
            exempt = "bias" in name or "bn" in name or (is_library and parameter.ndim == 1)
            (excluded if exempt else adapted).append(parameter)
    return [
        {"params": adapted, "weight_decay": weight_decay},
        {"params": excluded, "weight_decay": 0.0, "LARS_exclude": True},
    ]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) of the gradients that momentum SGD gets.

    A tensor is updated with :func:`shared.optimisation.larc.scaled_gradients`. The learning rate is part of the
    momentum: ``v = momentum * v - lr * update``, so a lower rate takes effect at once on new gradients only.

    Args:
        groups: Parameter groups; one with ``LARS_exclude`` gets plain momentum SGD with its own weight decay.
        lr: Learning rate.
        momentum: Weight of the old velocity.
        nesterov: Look ahead by one step of momentum.
        trust_coefficient: Size of an update, before ``lr``, relative to that of its tensor; 0: plain SGD everywhere.
        eps: Keeps the scaling finite.
    """

    _step_supports_amp_scaling = True  # like torch's fused optimisers: `found_inf` skips the step on the device

    def __init__(
        self,
        groups: list[dict],
        lr: float = 0.0,
        momentum: float = 0.9,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
    ):
        super().__init__(
            groups, dict(lr=lr, momentum=momentum, weight_decay=0.0, nesterov=nesterov, LARS_exclude=False)
        )
        self.trust_coefficient, self.eps = trust_coefficient, eps  # not in the state, as in the released files

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient; with ``found_inf`` set to 1 nothing changes."""
        if closure is not None:
            raise ValueError("LARS takes no closure")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)

    def _update(self, params: list[Tensor], group: dict) -> None:
        if self.trust_coefficient > 0 and not group.get("LARS_exclude", False):
            updates = scaled_gradients(params, group["weight_decay"], self.trust_coefficient, self.eps)
        else:
            updates = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
        torch._foreach_mul_(updates, -group["lr"])
        velocities = [momentum_buffer(self, p) for p in params]
        found_inf = getattr(self, "found_inf", None)
        momentum = group["momentum"]
        if found_inf is not None:  # a step that is left out adds zeros to what it multiplies by 1
            skip = found_inf.bool()
            updates = [torch.where(skip, 0.0, update) for update in updates]
            momentum = torch.where(skip, 1.0, momentum)
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, updates)
        steps = velocities
        if group["nesterov"]:
            torch._foreach_add_(updates, velocities, alpha=group["momentum"])
            steps = updates
        if found_inf is not None:
            steps = [torch.where(skip, 0.0, step) for step in steps]
        torch._foreach_add_(params, steps)


def lr_schedule(
    start_lr: float, lr: float, final_lr: float, warmup_epochs: int, epochs: int, steps_per_epoch: int
) -> np.ndarray:
    """Learning rate of every step: linear from ``start_lr``, which the first step has, then half a cosine.

    Unlike in ``shared/optimisation/schedules.py`` the warm-up does not include its end, so ``lr`` appears once.

    Returns:
        float64, shape (epochs * steps_per_epoch,).
    """
    warmup_steps, total_steps = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    step = np.arange(total_steps)
    warmup = start_lr + step / max(warmup_steps, 1) * (lr - start_lr)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    cosine = np.maximum(final_lr, final_lr + (lr - final_lr) / 2 * (1 + np.cos(math.pi * progress)))
    return np.where(step < warmup_steps, warmup, cosine)
