"""Features that are spread over the processes: their mean and covariance, some rows of them, labels of them."""

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


def rows_of_all(features: Tensor, rows: Tensor) -> Tensor:
    """Rows of the data set, (len(rows), D), of which every process has every W-th one, on every process."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    mine = rows % world_size == rank
    found = features.new_zeros(len(rows), features.shape[1])
    found[mine.to(features.device)] = features[(rows[mine] // world_size).to(features.device)]
    return distributed.all_reduce_sum(found)  # the others have zeros there


def labels_of_all(labels: Tensor, images: Tensor, num_images: int) -> Tensor:
    """Labels of all images, (N,) on the CPU of every process, from what each knows of some; -1 where none does."""
    known = torch.zeros(num_images, dtype=torch.long, device=labels.device)
    known[images.to(labels.device)] = labels + 1
    return distributed.all_reduce_sum(known).cpu() - 1
