"""Regional maximum activations of convolutions (Tolias et al., "Particular object retrieval with integral
max-pooling of CNN activations", ICLR 2016)."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

OVERLAP = 0.4  # wanted between neighbouring regions of the coarsest level
MIN_EIGENVALUE = 1e-5  # of the largest one


def rmac_regions(height: int, width: int, levels: int) -> list[tuple[int, int, int, int]]:
    """Squares (x, y, width, height) that cover a map evenly, row by row, from the coarsest level to the finest."""
    short = min(height, width)
    extra = _extra_regions(short, max(height, width))
    regions = []
    for level in range(1, levels + 1):
        side = 2 * short // (level + 1)
        rows = _starts(height, side, level + (extra if height > width else 0))
        columns = _starts(width, side, level + (extra if width > height else 0))
        regions += [(x, y, side, side) for y in rows for x in columns]
    return regions


def _extra_regions(short: int, long: int) -> int:
    """How many more regions the long side takes than the short one, for an overlap next to ``OVERLAP``."""
    if short == long:
        return 0
    overlaps = [(short * short - short * (long - short) / (count - 1)) / short**2 for count in range(2, 8)]
    return 1 + int(np.argmin([abs(overlap - OVERLAP) for overlap in overlaps]))


def _starts(length: int, side: int, count: int) -> list[int]:
    """First cells of ``count`` evenly spaced intervals of ``side`` cells, rounded as in the original program."""
    half = side // 2 - 1
    step = (length - side) / (count - 1) if count > 1 else 0.0
    return [min(max(int(np.floor(half + step * i)) - half, 0), length - side) for i in range(count)]


def region_vectors(maps: Tensor, levels: int) -> Tensor:
    """L2-normalised maxima over the regions of maps (C, H, W): (R, C)."""
    height, width = maps.shape[1:]
    regions = rmac_regions(height, width, levels)
    maxima = [maps[:, y : y + h, x : x + w].amax(dim=(1, 2)) for x, y, w, h in regions]
    return F.normalize(torch.stack(maxima), dim=1)


@dataclass
class Whitening:
    """PCA with whitening of region vectors.

    Attributes:
        mean: (C,).
        matrix: Projection, (components, C).
    """

    mean: Tensor
    matrix: Tensor

    @classmethod
    def fit(cls, vectors: Tensor, components: int) -> "Whitening":
        """Learn from region vectors (N, C) of another data set.

        Raises:
            ValueError: If there are fewer vectors or dimensions than components.
        """
        if components > min(vectors.shape):
            raise ValueError(f"--n_pca {components}: {len(vectors)} region vectors of {vectors.shape[1]} dimensions")
        vectors = vectors.double()
        mean = vectors.mean(dim=0)
        scatter = (vectors - mean).t() @ (vectors - mean)
        eigenvalues, directions = torch.linalg.eigh(scatter)
        eigenvalues = eigenvalues.clamp_min(MIN_EIGENVALUE * eigenvalues[-1])
        best = slice(-components, None)
        matrix = (directions[:, best] / eigenvalues[best].sqrt()).flip(1).t()
        return cls(mean.float(), matrix.float())

    def __call__(self, vectors: Tensor) -> Tensor:
        return (vectors - self.mean) @ self.matrix.t()


def rmac(vectors: Tensor, whitening: Whitening) -> Tensor:
    """Descriptor of an image from its region vectors (R, C): whitened, L2-normalised, summed, L2-normalised; (D,)."""
    return F.normalize(F.normalize(whitening(vectors), dim=1).sum(dim=0), dim=0)
