"""How many prototypes are in use, and telling a user in one sentence when the assignment has collapsed."""

import math

import torch
from torch import Tensor

from shared import distributed


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


class PrototypeUsage:
    """Counts for every prototype the images that were assigned to it in this epoch, on all processes.

    Args:
        nmb_prototypes: K.
    """

    def __init__(self, nmb_prototypes: int, device: torch.device | str = "cpu"):
        self.counts = torch.zeros(nmb_prototypes, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, codes: Tensor) -> None:
        """Count the likeliest prototype of every code (B, K); codes that are not finite count for none."""
        self.counts.index_add_(0, codes.argmax(dim=1), codes.isfinite().all(dim=1).long())

    def reset(self) -> None:
        """Start a new epoch."""
        self.counts.zero_()

    def summary(self) -> dict[str, Tensor]:
        """:func:`usage_of` the counts of all processes, which must all call this."""
        return usage_of(distributed.all_reduce_sum(self.counts))

    def of_epoch(self) -> dict[str, int]:
        """``prototypes_used`` and ``dead_prototypes``, for the line of an epoch; every process must call this."""
        used = int(self.summary()["prototypes_used"])
        return {"prototypes_used": used, "dead_prototypes": len(self.counts) - used}

    def state_dict(self) -> dict:
        """Counts of all processes, which must all call this."""
        return {"counts": distributed.all_reduce_sum(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        """Go on counting; an official checkpoint has no counts, its state is empty."""
        if state and distributed.is_main_process():
            self.counts.copy_(state["counts"])


class CollapseMonitor:
    """Reads the lines of the log and says once, for each kind of failure, what happened and which flag to try.

    Args:
        nmb_prototypes: K, for several sets that of the smallest.
        patience_steps: Steps before a verdict; random networks look flat at first.
        advice: What to try when the codes are ``uniform``, when ``few`` prototypes are used, and when the loss is
            ``flat``.
    """

    def __init__(self, nmb_prototypes: int, patience_steps: int, advice: dict[str, str]):
        self.nmb_prototypes = nmb_prototypes
        self.uniform_entropy = math.log(nmb_prototypes)
        self.patience_steps = patience_steps
        self.advice = advice
        self.warnings: dict[str, str] = {}  # by kind
        self.is_flat = False

    def check(self, line: dict) -> str | None:
        """A sentence if this line of the log shows a new problem, else None."""
        if line["step"] < self.patience_steps:
            return None
        kind, sentence = self._diagnose(line)
        if kind is None or kind in self.warnings:
            return None
        self.warnings[kind] = f"step {line['step']}: {sentence}: {self.advice[kind]}"
        return self.warnings[kind]

    def _diagnose(self, line: dict) -> tuple[str | None, str | None]:
        ln_k = f"ln K = {self.uniform_entropy:.3f}"
        if line.get("code_entropy", 0.0) > 0.99 * self.uniform_entropy:
            return "uniform", (
                f"COLLAPSE: the codes are uniform (entropy {line['code_entropy']:.3f} of {ln_k}), every image belongs "
                "to every prototype"
            )
        # a random assignment of n images to K prototypes has a perplexity of more than half of the smaller number
        expected = min(self.nmb_prototypes, line["assigned"])
        if line["prototype_perplexity"] < 0.1 * expected:
            return "few", (
                f"COLLAPSE: few prototypes are used (perplexity {line['prototype_perplexity']:.1f}, "
                f"{line['prototypes_used']:.0f} of {self.nmb_prototypes} got any of {line['assigned']:.0f} images)"
            )
        if line["feature_spread"] < 0.02:
            return "features", (
                f"COLLAPSE: all images have nearly the same embedding (spread {line['feature_spread']:.4f})"
            )
        was_flat, self.is_flat = self.is_flat, abs(line["loss"] / self.uniform_entropy - 1) < 0.005
        if was_flat and self.is_flat:  # a loss that only passes by is no problem
            return "flat", (
                f"the loss is still at {ln_k}, the value of a network that knows nothing about the other view's code"
            )
        return None, None
