"""Collapse diagnostics: what a log line says about the health of a training, as rules of the method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HealthRule:
    """A failure that the log shows.

    Attributes:
        name: Of the failure; each is told once.
        condition: Whether a line of the log shows it.
        sentence: What happened and which flag to try, formatted with the values of the line and those of the monitor.
        first_step: Lines before are no evidence.
    """

    name: str
    condition: Callable[[dict], bool]
    sentence: str
    first_step: int = 0


class HealthMonitor:
    """Reads the lines of a log and says once, for each kind of failure, what happened and which flag to try.

    Args:
        rules: In the order of their weight; the first that holds is the diagnosis of a line.

    Attributes:
        warnings: The sentences so far, by name of the rule.
    """

    def __init__(self, rules: Sequence[HealthRule] = ()):
        self.rules = rules
        self.warnings: dict[str, str] = {}

    def check(self, line: dict) -> str | None:
        """A sentence if this line shows a new problem, else None; values that are not finite hold no condition."""
        rule = next((rule for rule in self.rules if rule.condition(line)), None)
        if rule is None or rule.name in self.warnings or line["step"] < rule.first_step:
            return None
        self.warnings[rule.name] = f"step {line['step']}: {rule.sentence.format(**line)}"
        return self.warnings[rule.name]


def feature_spread(features: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of the L2-normalised rows of (N, D), times sqrt(D).

    About 1 for features spread over the whole sphere, 0 when all inputs give the same feature.
    """
    normalized = torch.nn.functional.normalize(features.detach().float(), dim=1)
    return normalized.std(dim=0).mean() * features.shape[1] ** 0.5


def rank_me(features: Tensor) -> Tensor:
    """Effective rank of features (N, D): exp of the entropy of the normalised singular values (RankMe, eq. 1)."""
    features = features.detach().float()
    singular_values = torch.linalg.svdvals(features.nan_to_num(0, 0, 0))  # refuses what is not finite
    p = singular_values / singular_values.sum().clamp_min(1e-12) + 1e-7
    return torch.where(features.isfinite().all(), torch.exp(-(p * p.log()).sum()), torch.nan)
