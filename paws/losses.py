"""The objectives: PAWS (Assran et al. 2021, section 3), SuNCEt and SimCLR (Assran et al. 2020). All in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from shared import distributed

MIN_TARGET = 1e-4  # smaller probabilities of a target count as 0: noise that costs a logarithm of nearly 0
TINY = torch.finfo(torch.float32).tiny


def soft_nearest_neighbours(queries: Tensor, supports: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Class probabilities by a vote of the supports, weighted with their similarity (eq. 1).

    Args:
        queries: Shape (N, D).
        supports: Shape (M, D), those of all processes.
        labels: Distributions over K classes, shape (M, K).
        temperature: Of the softmax over the cosine similarities.

    Returns:
        Shape (N, K).
    """
    similarities = F.normalize(queries.float(), dim=1) @ F.normalize(supports.float(), dim=1).T
    return torch.softmax(similarities / temperature, dim=1) @ labels


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """Raise to the power of 1 / T and normalise (section 3.2); T below 1 makes distributions more certain."""
    largest = probabilities.detach().amax(dim=1, keepdim=True)  # its power is 1: of a low T all others may become 0
    powers = (probabilities / largest) ** (1 / temperature)
    return powers / powers.sum(dim=1, keepdim=True)


def support_labels(
    imgs_per_class: int,
    classes_per_batch: int,
    world_size: int = 1,
    unique_classes: bool = False,
    smoothing: float = 0.0,
    views: int = 1,
) -> Tensor:
    """Labels of the supports of all processes, in the order in which they are gathered: rank, view, image, class.

    A class is known by its position in the batch: it is the same one for image slots 1, 2, ... With ``unique_classes``
    rank r owns columns r C to (r + 1) C - 1. Without, all ranks have the same classes and share the first C columns;
    the others are kept, as in the released runs, and get the smoothing's share (so rows sum to more than 1).

    Args:
        imgs_per_class: S, on each process.
        classes_per_batch: C, on each process.
        smoothing: Share of the probability that is spread over all classes.
        views: Views of every support.

    Returns:
        Shape (W * V * S * C, W * C).
    """
    owned = classes_per_batch * world_size if unique_classes else classes_per_batch
    off = smoothing / owned
    labels = torch.full((world_size, views, imgs_per_class, classes_per_batch, classes_per_batch * world_size), off)
    position = torch.arange(classes_per_batch)
    for rank in range(world_size):
        first = rank * classes_per_batch if unique_classes else 0
        labels[rank, :, :, position, first + position] = 1 - smoothing + off
    return labels.flatten(0, 3)


def paws_loss(
    anchors: Tensor,
    anchor_supports: Tensor,
    targets: Tensor,
    target_supports: Tensor,
    labels: Tensor,
    temperature: float = 0.1,
    sharpen_temperature: float = 0.25,
    me_max: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Consistency of the pseudo-labels of two views, the mean-entropy regulariser (eq. 2), and the predictions.

    Args:
        anchors: Representations of the unlabelled views of this process, view by view, shape (V * B, D): the two large
            ones first.
        anchor_supports: Those of its supports, shape (M, D).
        targets: Of the large views with their places swapped, so that row i is the other view of anchor i, shape
            (2 * B, D); constants.
        target_supports: Shape (M, D); constants.
        labels: Of the supports of all processes, shape (W * M, K).
        temperature: Of the similarities.
        sharpen_temperature: T of the targets.
        me_max: Without it the second value is 0.

    Returns:
        Mean cross-entropy of all views; minus the entropy of the mean sharpened prediction of all processes; the
        sharpened predictions of this process, shape (V * B, K).
    """
    predictions = soft_nearest_neighbours(
        anchors, distributed.all_gather_with_grad(anchor_supports.float()), labels, temperature
    )
    with torch.no_grad():
        pseudo_labels = sharpen(
            soft_nearest_neighbours(targets, distributed.all_gather(target_supports.float()), labels, temperature),
            sharpen_temperature,
        )
        num_small = len(anchors) // (len(targets) // 2) - 2
        if num_small:  # a small view is matched with the mean of both large ones
            mean = pseudo_labels.unflatten(0, (2, -1)).mean(dim=0)
            pseudo_labels = torch.cat([pseudo_labels, mean.repeat(num_small, 1)])
        pseudo_labels = torch.where(pseudo_labels < MIN_TARGET, 0.0, pseudo_labels)
    consistency = -(pseudo_labels * predictions.clamp_min(TINY).log()).sum(dim=1).mean()
    sharpened = sharpen(predictions, sharpen_temperature)
    if not me_max:
        return consistency, torch.zeros_like(consistency), sharpened
    mean = sharpened.mean(dim=0)
    # the mean over processes; its gradient is that of the local mean, for data-parallel training averages gradients
    mean = mean + (distributed.all_reduce_mean(mean) - mean).detach()
    return consistency, (mean * mean.clamp_min(TINY).log()).sum(), sharpened


def suncet_loss(representations: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised noise-contrastive estimation: vote of all other labelled images for an image's class.

    Args:
        representations: Of this process's labelled images, shape (M, D).
        labels: Those of all processes, in rank order, shape (W * M, K).

    Returns:
        Mean cross-entropy between an image's label and the vote; 0-d.
    """
    own = F.normalize(representations.float(), dim=1)
    everybody = distributed.all_gather_with_grad(own)
    first = distributed.get_rank() * len(own)
    scores = own @ everybody.T / temperature
    myself = torch.arange(len(own), device=own.device)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[myself, first + myself] = True
    votes = torch.softmax(scores.masked_fill(mask, -torch.inf), dim=1) @ labels
    return -(labels[first : first + len(own)] * votes.clamp_min(TINY).log()).sum(dim=1).mean()


def simclr_loss(representations: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent (Chen et al. 2020): find the other view of an image among those of all processes, which are constants.

    Args:
        representations: View 1 of this process's images, then view 2, shape (2 * B, D).

    Returns:
        Mean cross-entropy over the 2 * B views; 0-d.
    """
    own = F.normalize(representations.float(), dim=1)
    everybody = distributed.all_gather(own)
    first, batch = distributed.get_rank() * len(own), len(own) // 2
    scores = own @ everybody.T / temperature
    myself = torch.arange(len(own), device=own.device)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[myself, first + myself] = True
    return F.cross_entropy(scores.masked_fill(mask, -torch.inf), first + (myself + batch) % (2 * batch))
