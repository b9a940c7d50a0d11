"""Linear classification on features of a frozen network: the classifier, an epoch of training, exact validation."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from shared import distributed
from shared.images.loading import make_loader

from .features import check_features

Features = Callable[[Tensor], Tensor]


class LinearClassifier(nn.Module):
    """One linear layer, weights from N(0, 0.01^2), biases 0.

    Args:
        dim: Size of a flattened feature.
        num_labels: Number of classes.
    """

    def __init__(self, dim: int, num_labels: int):
        super().__init__()
        self.linear = nn.Linear(dim, num_labels)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, ...) to logits (B, num_labels)."""
        return self.linear(features.flatten(1))


def train_one_epoch(
    classifier: nn.Module,
    features: Features,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
) -> float:
    """Cross-entropy on every batch; only the classifier learns.

    Args:
        classifier: Maps features (B, ...) to logits; wrapped for several processes if there are any.
        features: The frozen network, images (B, C, H, W) to features (B, ...).
        batches: Images and labels (B,), on the device of the classifier.

    Returns:
        Mean loss over the images of all processes.

    Raises:
        ValueError: If the features are not finite or zero, or the loss is not finite.
    """
    classifier.train()
    total = torch.zeros(2, dtype=torch.double, device=next(classifier.parameters()).device)  # loss, images
    for images, labels in batches:
        with torch.no_grad():
            inputs = features(images)
        if total[1] == 0:
            check_features(inputs.flatten(1))
        loss = F.cross_entropy(classifier(inputs), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += torch.stack([loss.detach().double(), torch.ones_like(total[0])]) * len(labels)
    loss, images = distributed.all_reduce_sum(total).tolist()
    if not torch.isfinite(torch.tensor(loss)):
        raise ValueError(f"the loss is {loss}; try a smaller --lr")
    return loss / images


@torch.no_grad()
def validate(
    classifier: nn.Module,
    features: Features,
    dataset: Dataset,
    device: torch.device,
    batch_size: int = 128,
    num_workers: int = 0,
) -> dict[str, float]:
    """Loss and accuracy over the whole data set, every image counted once, shared out over the processes.

    Args:
        classifier: Maps features (B, ...) to logits (B, num_labels).
        features: As for :func:`train_one_epoch`.
        dataset: Items ``(image, label, ...)``.

    Returns:
        ``loss``, ``acc1`` and ``acc5`` (among the min(5, num_labels) best), accuracies in percent; the same on every
        process.

    Raises:
        ValueError: If features are all zeros or not finite.
    """
    classifier.eval()
    share = range(distributed.get_rank(), len(dataset), distributed.get_world_size())
    loader = make_loader(dataset, batch_size=batch_size, sampler=share, num_workers=num_workers, device=device)
    totals = torch.zeros(3, dtype=torch.double, device=device)
    for images, labels, *_ in loader:
        inputs = features(images.to(device, non_blocking=True))
        check_features(inputs.flatten(1))
        labels = labels.to(device)
        logits = distributed.unwrap(classifier)(inputs)  # shares may differ by a batch: no collective in here
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        totals += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), hits[:, 0].sum(), hits.sum()])
    loss, top1, top5 = (distributed.all_reduce_sum(totals) / len(dataset)).tolist()
    return {"loss": loss, "acc1": 100 * top1, "acc5": 100 * top5}
