"""Mean and covariance of features that are spread over the processes."""

import torch
from torch import Tensor

from shared import distributed

BLOCK_ROWS = 1 << 14  # features that are looked at together


def mean_and_covariance(features: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor, int]:
    """Of the rows of all processes, the same on each of them.

    Args:
        features: Rows of this process, (n, D), float32.
        device: Where to compute; the rows go there in portions.

    Returns:
        Mean (D,), float32; covariance, divided by the number of rows, (D, D), float64; the number of rows.
    """
    rows = int(distributed.all_reduce_sum(torch.tensor(len(features), device=device)))
    total = torch.zeros(features.shape[1], dtype=torch.double, device=device)
    for block in features.split(BLOCK_ROWS):
        total += block.to(device).sum(dim=0, dtype=torch.double)
    mean = (distributed.all_reduce_sum(total) / rows).float()
    covariance = torch.zeros(features.shape[1], features.shape[1], dtype=torch.double, device=device)
    for block in features.split(BLOCK_ROWS):
        centred = block.to(device) - mean
        covariance += centred.t() @ centred  # float32 inside a block, float64 over blocks
    return mean, distributed.all_reduce_sum(covariance) / rows, rows
