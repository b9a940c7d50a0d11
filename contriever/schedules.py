"""Learning rates as parts of the peak, a function of the number of updates done before."""

import math


def linear(step: int, warmup: int, total: int, min_ratio: float) -> float:
    """Linear warm-up, then linearly down to ``min_ratio`` at ``total``.

    As in the reference, the warm-up climbs to 1 - ``min_ratio`` only and the decay starts at 1, the first update has a
    rate of 0, and a warm-up of -1 is none.
    """
    if step < warmup:
        return (1 - min_ratio) * step / max(1, warmup)
    return max(0.0, 1.0 + (min_ratio - 1) * (step - warmup) / max(1, total - warmup))


def cosine(step: int, warmup: int, total: int, min_ratio: float) -> float:
    """Linear warm-up, then a quarter of a cosine (not half of one) down to ``min_ratio`` at ``total``."""
    if step < warmup:
        return step / warmup
    return min_ratio + (1 - min_ratio) * math.cos(math.pi / 2 * (step - warmup) / (total - warmup))


SCHEDULES = {"linear": linear, "cosine": cosine}
