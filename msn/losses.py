"""The objective of MSN (Assran et al. 2022): anchors predict their target's assignment to prototypes."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import distributed
from shared.sinkhorn import sinkhorn_knopp

SINKHORN_ITERATIONS = 3
LOG_ZERO = 1e4  # minus this: the logarithm of an assignment of 0


@dataclass
class LossTerms:
    """What :class:`MSNLoss` computes, each 0-d except ``targets``.

    Attributes:
        total: The objective: ``cross_entropy + memax_weight * me_max + ent_weight * entropy``.
        cross_entropy: Of the targets and the anchors' assignments (eq. 1, first term).
        me_max: KL divergence of the mean assignment from the prior; 0 where it is switched off.
        entropy: Mean entropy of the anchors' assignments; 0 where it is switched off.
        targets: Assignments of the targets, shape (B, K).
    """

    total: Tensor
    cross_entropy: Tensor
    me_max: Tensor
    entropy: Tensor
    targets: Tensor


class MSNLoss(nn.Module):
    """Cross-entropy between assignments of targets and of anchors, with mean-entropy maximisation (section 3, eq. 1).

    Args:
        num_proto: K, number of prototypes.
        temperature: Of the softmax over prototypes, for anchors and targets.
        me_max: Whether the mean assignment is drawn to the prior.
        memax_weight: Weight of that term.
        use_ent: Whether to compute the anchors' entropy.
        ent_weight: Its weight.
        use_sinkhorn: Balance the targets over the prototypes.
        label_smoothing: Share of an assignment that is spread evenly over the prototypes.
        log_prior: Logarithms of the prior over prototypes, shape (K,); None: MSN's uniform one.

    Raises:
        ValueError: If an argument is out of range, or a prior that is not uniform meets ``use_sinkhorn``.
    """

    def __init__(
        self,
        num_proto: int,
        temperature: float = 0.1,
        me_max: bool = True,
        memax_weight: float = 1.0,
        use_ent: bool = False,
        ent_weight: float = 1.0,
        use_sinkhorn: bool = True,
        label_smoothing: float = 0.0,
        log_prior: Tensor | None = None,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"--temperature {temperature} is not positive")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"--label_smoothing {label_smoothing} is outside [0, 1)")
        if log_prior is not None and use_sinkhorn:
            raise ValueError(
                "--use_sinkhorn true balances the targets evenly, which contradicts the prior of --power_law_exponent "
                "or --prior; switch one of them off"
            )
        self.temperature, self.label_smoothing = temperature, label_smoothing
        self.me_max, self.memax_weight = me_max, memax_weight
        self.use_ent, self.ent_weight = use_ent, ent_weight
        self.use_sinkhorn = use_sinkhorn
        log_prior = log_power_law(num_proto, 0.0) if log_prior is None else log_prior
        self.register_buffer("log_prior", log_prior, persistent=False)

    def forward(self, anchors: Tensor, targets: Tensor, prototypes: Tensor, sharpen: float) -> LossTerms:
        """The terms of the loss for one batch.

        Args:
            anchors: Embeddings of the V anchor views, view-major, shape (V * B, D).
            targets: Embeddings of the target views, shape (B, D), taken as constants.
            prototypes: Shape (K, D); they learn from the anchors only.
            sharpen: Temperature T by which the targets' assignments are sharpened.

        Raises:
            ValueError: If the rows of ``anchors`` are no multiple of those of ``targets``.
        """
        if len(anchors) % len(targets):
            raise ValueError(f"{len(anchors)} anchors are not the views of {len(targets)} targets")
        with torch.no_grad():
            assigned = self.target_assignments(targets, prototypes, sharpen)
        log_probs = self.log_assignments(anchors, prototypes)
        probs = log_probs.exp()

        repeated = assigned.repeat(len(anchors) // len(targets), 1)
        cross_entropy = -(repeated * log_probs).sum(dim=1).mean()
        total = cross_entropy
        me_max = entropy = torch.zeros_like(total)
        if self.me_max:
            mean = MeanOverProcesses.apply(probs.mean(dim=0))
            me_max = (torch.xlogy(mean, mean) - mean * self.log_prior).sum()
            total = total + self.memax_weight * me_max
        if self.use_ent:
            entropy = -(probs * log_probs).sum(dim=1).mean()
            total = total + self.ent_weight * entropy
        return LossTerms(total, cross_entropy, me_max, entropy, assigned)

    def log_assignments(self, embeddings: Tensor, prototypes: Tensor) -> Tensor:
        """Logarithms of the softmax over cosines with the prototypes, (rows, D) -> (rows, K), float32."""
        cosines = F.normalize(embeddings.float(), dim=1) @ F.normalize(prototypes.float(), dim=1).T
        log_probs = (cosines / self.temperature).log_softmax(dim=1)
        if self.label_smoothing == 0:
            return log_probs
        smoothing = self.label_smoothing
        floor = torch.full_like(log_probs, math.log(smoothing / len(prototypes)))
        return torch.logaddexp(log_probs + math.log(1 - smoothing), floor)

    def target_assignments(self, embeddings: Tensor, prototypes: Tensor, sharpen: float) -> Tensor:
        """Assignments p^(1/T) / sum p^(1/T), balanced over the prototypes if asked for, (B, D) -> (B, K)."""
        log_probs = self.log_assignments(embeddings, prototypes)
        powers = log_probs.exp().pow(1 / sharpen)
        total = powers.sum(dim=1, keepdim=True)
        # small powers are 0 in float32, and balancing shows it: released networks were trained with that; a row of
        # nothing but zeros, though, gave NaN
        sharpened = torch.where(total > 0, powers / total, (log_probs / sharpen).softmax(dim=1))
        if not self.use_sinkhorn:
            return sharpened
        scores = sharpened.log().clamp_min(-LOG_ZERO)
        return sinkhorn_knopp(scores, epsilon=1.0, num_iters=SINKHORN_ITERATIONS, max_abs_score=LOG_ZERO)


def log_power_law(num_proto: int, exponent: float) -> Tensor:
    """Logarithms of a prior p_k proportional to 1 / k^exponent over K prototypes (PMSN), shape (K,)."""
    if exponent < 0:
        raise ValueError(f"--power_law_exponent {exponent} is negative")
    return (-exponent * torch.arange(1, num_proto + 1, dtype=torch.float32).log()).log_softmax(dim=0)


def read_log_prior(path: str, num_proto: int) -> Tensor:
    """Logarithms of the prior in a text file, K positive numbers in proportion to it, shape (K,).

    Raises:
        ValueError: If the file cannot be read or holds anything else.
    """
    try:
        weights = torch.tensor([float(word) for word in Path(path).read_text().split()])
    except (OSError, ValueError) as error:
        raise ValueError(f"--prior {path} cannot be read: {error}") from error
    if len(weights) != num_proto or not ((weights > 0) & weights.isfinite()).all():
        raise ValueError(f"--prior {path}: expected {num_proto} positive numbers (--num_proto), found {len(weights)}")
    return weights.log().log_softmax(dim=0)


class MeanOverProcesses(torch.autograd.Function):
    """Mean over processes; backward, the gradient of the mean is that of this process's own share.

    Its factor 1 / W comes in when the gradients of the parameters are averaged over processes.
    """

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return distributed.all_reduce_mean(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def new_prototypes(num_proto: int, dim: int) -> nn.Parameter:
    """K prototypes drawn uniformly in +-1 / sqrt(D), shape (K, D)."""
    bound = dim**-0.5
    return nn.Parameter(torch.empty(num_proto, dim).uniform_(-bound, bound))
