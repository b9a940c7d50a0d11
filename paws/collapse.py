"""Telling a user in one sentence when the pseudo-labels have collapsed."""

import math

ADVICE = {
    "few": "use --me_max true, lower --lr, or take more supports (--supervised_imgs_per_class, --supervised_views)",
    "uncertain": "lower --sharpen or --temperature, or lengthen --warmup",
    "features": "lower --lr or lengthen --warmup",
}


class CollapseMonitor:
    """Reads the lines of the log and says once, for each kind of failure, what happened and which flag to try.

    Args:
        num_classes: K, classes of the supports of all processes.
        patience_steps: Steps before a verdict; random networks look flat at first.
    """

    def __init__(self, num_classes: int, patience_steps: int):
        self.num_classes, self.patience_steps = num_classes, patience_steps
        self.warnings: dict[str, str] = {}  # by kind

    def check(self, line: dict) -> str | None:
        """A sentence if this line of the log shows a new problem, else None."""
        if line["step"] < self.patience_steps or not math.isfinite(line["loss"]):
            return None
        kind, sentence = self._diagnose(line)
        if kind is None or kind in self.warnings:
            return None
        self.warnings[kind] = f"step {line['step']}: COLLAPSE: {sentence}: {ADVICE[kind]}"
        return self.warnings[kind]

    def _diagnose(self, line: dict) -> tuple[str | None, str | None]:
        if line["feature_spread"] < 0.02:
            return "features", f"all images have nearly the same representation (spread {line['feature_spread']:.4f})"
        perplexity = math.exp(line["mean_entropy"])
        if perplexity < 0.3 * self.num_classes:
            return "few", f"the pseudo-labels use few of the {self.num_classes} classes (perplexity {perplexity:.1f})"
        if line["certainty"] < 1.5 / self.num_classes:
            return "uncertain", f"the pseudo-labels are nearly uniform (largest probability {line['certainty']:.3f})"
        return None, None
