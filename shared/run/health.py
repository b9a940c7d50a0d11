"""Collapse diagnostics: what a log line says about the health of a training, as rules of the method."""

import math
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


# --- Conditions and rules that several methods have -------------------------------------------------------------------


def shares_of_ln_k(**ranges: tuple[float, float]) -> Callable[[dict], bool]:
    """Whether the values of a line with these names lie between such shares of its ``ln_k``."""
    return lambda line: all(low < line[name] / line["ln_k"] < high for name, (low, high) in ranges.items())


def patience(epochs: int, steps_per_epoch: int) -> int:
    """First step that says anything: a quarter of the run, two epochs and a little more of a long one.

    Random networks look flat.
    """
    return min(epochs * steps_per_epoch // 4, 2 * steps_per_epoch + 1000)


def equal_features(what: str, advice: str, first_step: int) -> HealthRule:
    """All images have nearly the same ``what``, as its ``feature_spread`` shows."""
    sentence = f"COLLAPSE: all images have nearly the same {what} (spread {{feature_spread:.4f}}): {advice}"
    return HealthRule("features", lambda line: line["feature_spread"] < 0.02, sentence, first_step)


def still_at_ln_k(what: str, who: str, advice: str, first_step: int, key: str = "loss") -> HealthRule:
    """The loss ``key`` of the log, called ``what``, stays at ln K, the value of those ``who`` know nothing."""
    condition = twice_in_a_row(shares_of_ln_k(**{key: (0.995, 1.005)}))
    sentence = f"the {what} is still at ln K = {{ln_k:.3f}}, the value of {who}: {advice}"
    return HealthRule("flat", condition, sentence, first_step)


def uniform_codes(advice: str, first_step: int) -> HealthRule:
    """Assignments say nothing about their images, as ``code_entropy`` shows."""
    sentence = (
        "COLLAPSE: the codes are uniform (entropy {code_entropy:.3f} of ln K = {ln_k:.3f}), every image belongs to "
        f"every prototype: {advice}"
    )
    return HealthRule("uniform", shares_of_ln_k(code_entropy=(0.99, 2)), sentence, first_step)


def few_prototypes(number: int, advice: str, first_step: int) -> HealthRule:
    """Of ``number`` prototypes few are used, as what :func:`usage_of` says shows."""

    def uses_few(line: dict) -> bool:
        # a random assignment of n images to K prototypes has a perplexity of more than half of the smaller number
        return line["prototype_perplexity"] < 0.1 * min(number, line["assigned"])

    sentence = (
        "COLLAPSE: few prototypes are used (perplexity {prototype_perplexity:.1f}, {prototypes_used:.0f} of "
        f"{number} got any of {{assigned:.0f}} images): {advice}"
    )
    return HealthRule("few", uses_few, sentence, first_step)


def twice_in_a_row(condition: Callable[[dict], bool]) -> Callable[[dict], bool]:
    """Holds where ``condition`` holds and held on the line before: a loss that only passes by is no problem."""
    held = False

    def holds_again(line: dict) -> bool:
        nonlocal held
        before, held = held, condition(line)
        return before and held

    return holds_again


# --- Monitor ----------------------------------------------------------------------------------------------------------


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


# --- Measures ---------------------------------------------------------------------------------------------------------


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


def usage_of(counts: Tensor) -> dict[str, Tensor]:
    """Statistics of the number of images that each of K prototypes got; 0-d tensors.

    ``assigned``: images; ``prototypes_used``: prototypes that got any; ``prototype_perplexity``: the number of equally
    used prototypes with the same entropy.
    """
    shares = counts / counts.sum().clamp_min(1)
    return {
        "assigned": counts.sum(),
        "prototypes_used": (counts > 0).sum(),
        "prototype_perplexity": torch.special.entr(shares).sum().exp(),
    }


def assignment_health(codes: Tensor, counts: Tensor, embeddings: Tensor) -> dict[str, Tensor | float]:
    """What shows a collapse: codes (B, K) with an entropy of ln K, few prototypes in use, embeddings that are equal."""
    return {
        "code_entropy": torch.special.entr(codes).sum(dim=1).mean(),
        "ln_k": math.log(codes.shape[1]),
        **usage_of(counts),
        "feature_spread": feature_spread(embeddings),
        "rank_me": rank_me(embeddings),
    }
