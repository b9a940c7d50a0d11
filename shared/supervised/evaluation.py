"""Accuracy of a classifier, shared out over the processes and exact."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from shared import distributed
from shared.evaluation.features import RankSampler, check_replaced
from shared.images.loading import EvalDataset, make_loader
from shared.multicrop import channels_last
from shared.optimisation.precision import Precision


@torch.no_grad()
def evaluate_classifier(
    network: nn.Module,
    dataset: Dataset,
    precision: Precision,
    batch_size: int,
    num_workers: int = 0,
    between_batches: Callable[[], None] | None = None,
    absent: Sequence[int] = (),
) -> dict[str, float]:
    """Classify every image once.

    The network is put in eval mode and given back with every module in the mode it came in.

    Args:
        network: Maps images (B, C, H, W) to logits (B, classes).
        dataset: Items (image, label, index).
        batch_size: Images per process in one pass.
        between_batches: Called after every batch, equally often on every process; may raise to stop.
        absent: Classes of which there are no images: they are not predicted either.

    Returns:
        ``loss`` (cross-entropy), ``acc1`` and ``acc5`` in percent (``acc5``: among the five most likely classes, or all
        if there are fewer).
    """
    share = RankSampler(len(dataset))
    own = len(range(share.rank, len(dataset), share.world_size))  # the rest fills up the last batch
    loader = make_loader(
        dataset, batch_size=batch_size, sampler=share, num_workers=num_workers, device=precision.device
    )
    sums = torch.zeros(3, dtype=torch.double, device=precision.device)
    absent = torch.tensor(list(absent), dtype=torch.long, device=precision.device)
    modes = {module: module.training for module in network.modules()}
    network.eval()
    done, read = 0, []
    for images, labels, indices in loader:
        rows = slice(0, max(0, own - done))
        labels = labels[rows].to(precision.device, non_blocking=True)
        with precision.autocast():
            logits = network(channels_last(images.to(precision.device, non_blocking=True)))[rows].float()
        logits.index_fill_(1, absent, -torch.inf)
        read += indices[rows].tolist()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss.double(), hits[:, 0].sum(), hits.sum()])
        done += len(images)
        if between_batches is not None:
            between_batches()
    for module, mode in modes.items():
        module.training = mode
    if isinstance(dataset, EvalDataset):
        replaced = [dataset.rows[i] for i, index in zip(share, read, strict=False) if dataset.rows[i] != index]
        check_replaced(dataset, [index for part in distributed.all_gather_object(replaced) for index in part])
    loss, top1, top5 = (distributed.all_reduce_sum(sums) / len(dataset)).tolist()
    return {"loss": loss, "acc1": 100 * top1, "acc5": 100 * top5}
