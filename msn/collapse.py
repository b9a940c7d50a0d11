"""Telling a user in one sentence when training has collapsed or does not move."""

import math

LIKE_A_START = ("uniform", "flat")


class CollapseMonitor:
    """Reads the lines of the log and says once, for each kind of failure, what happened and which flag to try.

    Targets have two ways to say nothing about their image: all assigned to one prototype, which mean-entropy
    maximisation prevents, and all spread over every prototype, which sharpening prevents.

    Args:
        num_proto: Number of prototypes K.
        patience_steps: Steps before a verdict.
        warmup_steps: Length of the learning rate's warm-up, at whose start a healthy run may look uniform and flat; the
            verdicts on these wait ``patience_steps`` more after it.

    Attributes:
        said: The sentences so far, by kind of failure.
    """

    def __init__(self, num_proto: int, patience_steps: int, warmup_steps: int = 0):
        self.uniform_entropy = math.log(num_proto)
        self.patience_steps = patience_steps
        self.warmup_steps = warmup_steps
        self.warnings: dict[str, str] = {}

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
        entropy = line["target_entropy"] / self.uniform_entropy
        information = line["information"] / self.uniform_entropy
        where = f"step {line['step']}:"
        if entropy > 0.8 and information < 0.02:
            return "uniform", (
                f"{where} COLLAPSE: the targets are spread over all prototypes (entropy {line['target_entropy']:.3f} "
                f"of ln K = {self.uniform_entropy:.3f}): lower --start_sharpen and --final_sharpen, or make the views "
                "milder."
            )
        if information < 0.02:
            return "one assignment", (
                f"{where} COLLAPSE: all targets have nearly the same assignment ({line['information']:.4f} nats tell "
                "images apart): keep --me_max true, raise --memax_weight (5 without Sinkhorn), or --use_sinkhorn true."
            )
        if line["feature_spread"] < 0.02:
            return "features", (
                f"{where} COLLAPSE: all images have nearly the same embedding (spread {line['feature_spread']:.4f}): "
                "lower --lr, lengthen --warmup, or keep --use_bn true."
            )
        if abs(line["msn"] / self.uniform_entropy - 1) < 0.005:
            return "flat", (
                f"{where} the cross-entropy is still at ln K = {self.uniform_entropy:.3f}, the value of anchors that "
                "know nothing: raise --lr or lower --ema for short runs; with few images lower --num_proto."
            )
        return None, None
