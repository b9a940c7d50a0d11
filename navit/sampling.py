"""What is drawn for an image: its resolution, and which of its tokens are dropped.

Sizes are (height, width) in pixels; the effective resolution is the side of a square of the same area. The caller seeds
the generators, with the number of the image in the run.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

DROPS = ("none", "constant", "beta", "resolution")

# --- Resolutions (sections 2.2 and 3.2) -------------------------------------------------------------------------------


def effective_resolution(u: np.ndarray, low: float, high: float, sample: str = "side") -> np.ndarray:
    """The resolution for u in [-1, 1], which is mapped linearly to sides (``side``) or to areas (``area``)."""
    power = 1 if sample == "side" else 2
    return (low**power + (u + 1) / 2 * (high**power - low**power)) ** (1 / power)


def target_size(size: tuple[int, int], resolution: float) -> tuple[float, float]:
    """The size of an image of this effective resolution (0: its own), of the same shape."""
    scale = resolution / math.sqrt(math.prod(size)) if resolution else 1.0
    return size[0] * scale, size[1] * scale


def nearest_grid(size: tuple[int, int], resolution: float, patch: int) -> tuple[int, int]:
    """Rows and columns of the nearest whole patches, at least one."""
    return tuple(max(1, math.floor(side / patch + 0.5)) for side in target_size(size, resolution))


def fitting_size(
    size: tuple[int, int], most: int, patch: int, whole: bool = True, most_a_side: float = math.inf
) -> tuple[int, int]:
    """The largest size of the same shape with at most so many patches, as NaFlex finds it, in float32.

    Sides are rounded up to patches, or with ``whole`` False down to pixels, of at least one.
    """
    low, high, eps = np.float32(1e-6), np.float32(100), np.float32(1e-5)
    unit, rounded = (patch, math.ceil) if whole else (1, math.floor)

    def scaled(scale: np.float32) -> list[int]:
        return [max(1, rounded(np.float32(side) * scale / np.float32(unit))) * unit for side in size]

    while high - low >= eps:
        middle = (low + high) / np.float32(2)
        sides = [side / patch for side in scaled(middle)]
        low, high = (middle, high) if math.prod(sides) <= most and max(sides) <= most_a_side else (low, middle)
    return tuple(scaled(low))


@dataclass(frozen=True)
class Resolutions:
    """Effective resolutions between ``low`` and ``high``."""

    low: float
    high: float
    distribution: str = "uniform"  # of u; or normal, truncated to [-1, 1]
    mean: float = 0.0  # of normal, whose deviation is 1
    sample: str = "side"

    def draw(self, rng: Generator) -> float:
        u = rng.uniform(-1, 1)
        while self.distribution == "normal" and abs(u := rng.normal(self.mean, 1)) > 1:
            pass
        return float(effective_resolution(u, self.low, self.high, self.sample))


# --- Dropped tokens (sections 2.2 and 3.3) ----------------------------------------------------------------------------


def beta_parameters(mean: float, most: float) -> tuple[float, float]:
    """Alpha and beta of u, for rates u * ``most`` of this mean: the variance of u is 0.3 of the largest possible."""
    m = mean / most
    return m * (1 / 0.3 - 1), (1 - m) * (1 / 0.3 - 1)


def rate_by_length(
    length: np.ndarray, lengths: tuple[int, int], rates: tuple[float, float], deviation: float = 0.02
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean rate of images of so many tokens, linear between two lengths, and the limits of its normal distribution."""
    mean = rates[0] + (np.asarray(length) - lengths[0]) / max(lengths[1] - lengths[0], 1) * (rates[1] - rates[0])
    return mean, mean - 2 * deviation, mean + 2 * deviation


def scheduled_rate(seen: np.ndarray, middle: float, tau: float, rates: tuple[float, float]) -> np.ndarray:
    """Rate after so many images: a sigmoid between two rates, falling for ``tau`` < 0."""
    return rates[0] + (rates[1] - rates[0]) / (1 + np.exp(-(np.asarray(seen) - middle) / tau))


@dataclass(frozen=True)
class Dropping:
    """Rates of dropped tokens."""

    kind: str = "none"  # constant; beta: per image; resolution: larger images drop more
    rate: float = 0.5
    most: float = 0.9  # of beta
    rates: tuple[float, float] = (0.2, 0.8)  # of the shortest and longest images; or the least and most of the schedule
    lengths: tuple[int, int] = (16, 256)  # tokens of these images
    tau: float = 0.0  # of a schedule that replaces ``rate``, in images; 0: none
    middle: float = 0.0

    def draw(self, length: int, seen: int, rng: Generator) -> np.ndarray:
        """Tokens that are kept, in order, of an image of so many; rounded half up, at least one."""
        if self.kind == "none":
            return np.arange(length)
        rate = float(scheduled_rate(seen, self.middle, self.tau, self.rates)) if self.tau else self.rate
        if self.kind == "beta":
            rate = self.most * rng.beta(*beta_parameters(min(rate, 0.999 * self.most), self.most))
        elif self.kind == "resolution":
            mean, low, high = rate_by_length(length, self.lengths, self.rates)
            while not low <= (rate := rng.normal(mean, 0.02)) <= high:
                pass
        kept = max(1, math.floor((1 - min(max(rate, 0.0), 1.0)) * length + 0.5))
        return np.sort(rng.permutation(length)[:kept])
