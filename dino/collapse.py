"""Telling a user in one sentence when training has collapsed or does not move."""

import math

LIKE_A_START = ("uniform", "flat")


class CollapseMonitor:
    """Reads the lines of the log and says once, for each kind of failure, what happened and which flag to try.

    The teacher's output has two ways to collapse (DINO, section 5.3): uniform over the K outputs (entropy ln K, KL 0),
    which sharpening prevents, and one output for every image (entropy 0, KL 0), which centring prevents.

    Args:
        out_dim: Number K of outputs of the head.
        patience_steps: Steps before a verdict.
        warmup_steps: Length of the learning rate's warm-up. At its start the centre takes away what all images have in
            common, which is nearly everything, so that a healthy run looks uniform and flat; the verdicts on these wait
            ``patience_steps`` more after it.

    Attributes:
        said: The sentences so far, by kind of failure.
    """

    def __init__(self, out_dim: int, patience_steps: int, warmup_steps: int = 0):
        self.uniform_entropy = math.log(out_dim)
        self.patience_steps = patience_steps
        self.warmup_steps = warmup_steps
        self.warnings: dict[str, str] = {}  # by kind

    def check(self, line: dict) -> str | None:
        """A sentence if this line of the log shows a new problem, else None."""
        if line["step"] < self.patience_steps:
            return None
        kind, sentence = self._diagnose(line)
        if kind is None or kind in self.warnings:
            return None
        if kind in LIKE_A_START and line["step"] < self.warmup_steps + self.patience_steps:
            return None
        self.warnings[kind] = sentence
        return sentence

    def _diagnose(self, line: dict) -> tuple[str | None, str | None]:
        entropy = line["teacher_entropy"] / self.uniform_entropy
        kl = line["kl"] / self.uniform_entropy
        where = f"step {line['step']}:"
        if entropy > 0.995 and kl < 0.005:
            return "uniform", (
                f"{where} COLLAPSE: the teacher's output is uniform (entropy {line['teacher_entropy']:.3f} of ln K = "
                f"{self.uniform_entropy:.3f}): lower --teacher_temp and --warmup_teacher_temp (0.04 is safe)."
            )
        if entropy < 0.02 and kl < 0.005:
            return "one output", (
                f"{where} COLLAPSE: the teacher gives every image the same output (entropy "
                f"{line['teacher_entropy']:.3f}): keep --center_momentum below 1 (0.9), or raise --teacher_temp."
            )
        if line["feature_spread"] < 0.02:
            return "features", (
                f"{where} COLLAPSE: all images have nearly the same feature (spread {line['feature_spread']:.4f}): "
                "lower --lr, or lengthen --warmup_epochs and --freeze_last_layer."
            )
        if abs(line["loss"] / self.uniform_entropy - 1) < 0.005:
            return "flat", (
                f"{where} the loss is still at ln K = {self.uniform_entropy:.3f}, the value of a student that knows "
                "nothing: raise --lr or lower --momentum_teacher for short runs; with few images lower --out_dim."
            )
        return None, None
