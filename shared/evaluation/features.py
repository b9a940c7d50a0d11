"""Features of a whole data set from a frozen network, the same on every process and in the order of the data set."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from shared import distributed
from shared.images.decode import ImageError
from shared.images.loading import EvalDataset, make_loader
from shared.multicrop import channels_last
from shared.run.estimate import progress


class RankSampler(Sampler):
    """Samples ``rank, rank + W, ...`` from ``first`` on; every rank gets ceil(N / W), the last sample fills up."""

    def __init__(self, num_samples: int, first: int = 0):
        self.num_samples, self.first = num_samples, first
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()

    def __len__(self) -> int:
        return -(-(self.num_samples - self.first) // self.world_size)

    def __iter__(self):
        last = self.num_samples - 1
        return (min(self.first + self.rank + i * self.world_size, last) for i in range(len(self)))


@torch.no_grad()
def feature_batches(
    model: nn.Module, dataset: Dataset, device: torch.device, batch_size: int, num_workers: int, first: int = 0
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Run the images from ``first`` on through the model, shared out over the processes, and tell of the time left.

    Yields:
        Number of the first sample, features (B, D) in float32, labels (B,) and indices (B,) of the batches of all
        processes together, in the order of the data set.
    """
    sampler, done = RankSampler(len(dataset), first), first
    loader = make_loader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers, device=device)
    for images, targets, indices in progress(loader, "features", len(loader), len(dataset) - first):
        with torch.compiler.set_stance("force_eager"):  # compiling for these sizes takes longer than what it saves
            features = model(channels_last(images.to(device, non_blocking=True))).float()
        batch = (features, *(numbers.to(device, non_blocking=True) for numbers in (targets, indices)))
        rows = slice(0, min(len(images) * sampler.world_size, len(dataset) - done))  # the last rows are fill
        yield done, *(_in_dataset_order(values)[rows] for values in batch)
        done += rows.stop


@torch.no_grad()
def extract_features(
    model: nn.Module,
    dataset: Dataset,
    device: torch.device,
    batch_size: int = 128,
    num_workers: int = 0,
    store_on: torch.device | str | None = None,
    between_batches: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run every image through the model once, shared out over the processes.

    The model is put in eval mode and given back in the mode it came in.

    Args:
        model: Maps images (B, C, H, W) to features (B, D).
        dataset: Items (image, label, index).
        device: Where the model is.
        batch_size: Images per process in one pass.
        num_workers: Loader processes.
        store_on: Where the features are kept; the model's device when None.
        between_batches: Called after every batch, equally often on every process; may raise to stop.

    Returns:
        Features (N, D) in float32 and labels (N,) in int64, both in the order of the data set on every process; images
        that are left out have the label ``LEFT_OUT`` and the features of another one.

    Raises:
        ValueError: If the data set is empty, or a feature vector is all zeros or not finite (first index named).
        ImageError: If more images of an :class:`EvalDataset` cannot be read than its policy allows.
    """
    num_samples = len(dataset)
    if num_samples == 0:
        raise ValueError("cannot extract features: the data set is empty")
    features = labels = None
    read = torch.empty(num_samples, dtype=torch.long, device=device)  # indices; another one for an unreadable image
    was_training = model.training
    model.eval()
    for done, batch, targets, indices in feature_batches(model, dataset, device, batch_size, num_workers):
        if features is None:
            features = batch.new_empty(num_samples, batch.shape[1], device=store_on)
            labels = targets.new_empty(num_samples, device=store_on)
        rows = slice(done, done + len(batch))
        features[rows], labels[rows], read[rows] = batch, targets, indices
        if between_batches is not None:
            between_batches()
    model.train(was_training)
    if isinstance(dataset, EvalDataset):
        rows = np.asarray(dataset.rows)
        check_replaced(dataset, rows[rows != read.cpu().numpy()])
    check_features(features)
    return features, labels


def check_replaced(dataset: EvalDataset, replaced: Sequence[int]) -> None:
    """Say how many images cannot be read, where they are left out or no list of them is kept.

    Args:
        replaced: Indices of those in whose place another one was read.

    Raises:
        ImageError: If they are all, or more than the data set's policy allows.
    """
    policy, what = dataset.bad_images, "others take their place"
    if policy.on_bad_image == "skip":
        what = f"left out{'' if policy.list_path is None else f', see {policy.list_path}'}"
    elif policy.list_path is not None:
        return
    if len(replaced):
        first, images = dataset.source.path(int(replaced[0])), f"{len(dataset)} images of {dataset.source.name}"
        if len(replaced) == len(dataset):
            raise ImageError(f"none of the {images} can be read, the first is {first}")
        message = f"{len(replaced)} of {images} cannot be read, the first is {first}"
        if len(replaced) > policy.limit:
            raise ImageError(f"{message}; --max_bad_fraction allows {policy.limit}")
        distributed.print_once(f"{message}; {what}")


def _in_dataset_order(batch: Tensor) -> Tensor:
    """Rows of all ranks, interleaved: (B, ...) on each of W ranks -> (B * W, ...)."""
    gathered = distributed.all_gather(batch)
    return gathered.unflatten(0, (-1, len(batch))).transpose(0, 1).flatten(0, 1)


def check_features(features: Tensor) -> None:
    """Refuse features (N, D) that would make every later number meaningless.

    Raises:
        ValueError: If a row is all zeros or holds NaN or infinity; the message names the first such row.
    """
    check_norms(features.norm(dim=1))


def check_norms(norms: Tensor) -> None:
    """The same by the norms (N,) of the features, for loops that do not wait for each batch."""
    for bad, what in ((~norms.isfinite(), "not finite"), (norms == 0, "all zeros")):
        if bad.any():
            raise ValueError(
                f"{int(bad.sum())} of {len(norms)} feature vectors are {what}, "
                f"the first is that of sample {int(bad.nonzero()[0])}"
            )
