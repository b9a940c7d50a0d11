"""Sharpness-aware minimisation: the gradient is taken where the loss is worst nearby (fine-tuning, section 4.4).

Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021 (SAM); Kwon et al.,
"ASAM: Adaptive Sharpness-Aware Minimization", ICML 2021.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

ETA = 0.01  # ASAM's, so that weights of 0 move too


class SharpnessAware:
    """Moves the weights to where the loss is highest within a small ball, and back.

    Args:
        parameters: Those that are trained.
        rho: Radius of the ball.
        adaptive: Measure distances in units of the weights' sizes (ASAM).
    """

    def __init__(self, parameters: Iterable[Tensor], rho: float, adaptive: bool):
        self.parameters = list(parameters)
        self.rho, self.adaptive = rho, adaptive
        self.old: list[Tensor] = []

    @torch.no_grad()
    def ascend(self) -> None:
        """w + rho T^2 g / |T g|, with the gradients g at hand and T = |w| + eta, or 1 without ``adaptive`` (eq. 3)."""
        parameters = [p for p in self.parameters if p.grad is not None]
        scales = [p.abs() + ETA if self.adaptive else torch.ones_like(p) for p in parameters]
        scaled = [scale * p.grad for scale, p in zip(scales, parameters, strict=True)]
        norm = torch.stack(torch._foreach_norm(scaled)).norm()
        self.old = [p.clone() for p in self.parameters]
        for p, scale, gradient in zip(parameters, scales, scaled, strict=True):
            p.add_(scale * gradient * (self.rho / (norm + 1e-12)))

    @torch.no_grad()
    def descend(self) -> None:
        """Back to where :meth:`ascend` began, bit for bit."""
        torch._foreach_copy_(self.parameters, self.old)
        self.old = []
