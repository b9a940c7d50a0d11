"""What both kinds of fine-tuning have in common: batches of labelled images, an epoch, what their checkpoints hold."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from shared import distributed
from shared.images.loading import BadImages, EpochBatchSampler, make_loader
from shared.images.training_data import TrainingData
from shared.images.views import ViewRecipe
from shared.multicrop import MultiCropDataset, normalize_views
from shared.networks.weights import weights_checksum
from shared.optimisation.optim import clip_grad_norm_per_tensor_
from shared.run.run import Run

from .augmentations import Recipe
from .labels import PartlyLabelled
from .support_sampler import SupportSampler


def labelled_batches(
    args: argparse.Namespace,
    images: PartlyLabelled,
    views: list[ViewRecipe],
    sampler: EpochBatchSampler | SupportSampler,
    batch_size: int,
    device: torch.device,
) -> TrainingData:
    """Views of the labelled images that ``sampler`` draws, ``batch_size`` on each process."""
    bad_images = BadImages(len(images.source), on_bad_image="error")  # a replacement could be of another class
    dataset = MultiCropDataset(images.source, views, args.seed, in_chans=args.in_chans, bad_images=bad_images)
    loader = make_loader(dataset, batch_sampler=sampler, num_workers=args.num_workers, device=device)
    batch_size, checksum = batch_size * distributed.get_world_size(), images.source.checksum()
    return TrainingData(dataset, sampler, loader, bad_images, checksum, batch_size, args.num_workers)


def train_one_epoch(
    encoder: nn.Module,
    batches: Iterable,
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    rates: np.ndarray,
    recipe: Recipe,
    run: Run,
) -> None:
    """One epoch on all views of labelled images, in the mode that the encoder is in.

    Args:
        batches: Yields (views, labels, indices).
        criterion: Loss of the outputs of the encoder for the images with these indices.
    """
    parameters = list(encoder.parameters())
    for step, (loaded, _, indices) in run.steps(batches):
        for group in optimizer.param_groups:
            group["lr"] = float(rates[step])
        optimizer.zero_grad(set_to_none=True)
        views = normalize_views(loaded, run.device, recipe.mean, recipe.std)
        with run.precision.autocast():
            _, outputs = encoder(views)
        loss = criterion(outputs, indices)
        run.backward(loss, optimizer)
        run.update(clip_grad_norm_per_tensor_(parameters, max_norm=0), optimizer)
        run.end_step(len(indices), {"loss": loss, "lr": rates[step]})


@dataclass
class Progress:
    """What the checkpoints of a fine-tuning hold beside network and optimiser.

    Attributes:
        pretrained: Checksum of the weights that the run started from.
        best: Best top-1 of all evaluations, in percent.
    """

    pretrained: int
    best: float = 0.0

    def state_dict(self) -> dict:
        return {"pretrained": self.pretrained, "best_top1_acc": self.best}

    def load_state_dict(self, state: dict) -> None:
        if state["pretrained"] != self.pretrained:
            raise ValueError("it started from other weights than those of --pretrained; use another --output_dir")
        self.best = state["best_top1_acc"]


def resume(
    run: Run,
    data: TrainingData,
    total_steps: int,
    run_flags: tuple[str, ...],
    encoder: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Go on from the run's newest checkpoint, or start from the weights that the encoder has.

    Raises:
        ValueError: If the checkpoint's run started from other weights, or with other ``run_flags``.
    """
    progress = Progress(weights_checksum(encoder))
    parts = {"progress": progress, "encoder": encoder, "opt": optimizer}
    layout = {"to_official": to_official, "from_official": from_official}
    run.resume(data, total_steps, run_flags, **layout, **parts)
    return progress


def to_official(state: dict) -> dict:
    """The state of a run, :class:`Progress` as its ``progress``, with the keys of the official checkpoints."""
    amp, progress, args = state.pop("fp16_scaler"), state.pop("progress"), state["args"]
    return state | progress | {"unlabel_prob": args["unlabeled_frac"], "lr": args["lr"], "amp": amp}


def from_official(checkpoint: dict) -> dict:
    progress = {key: checkpoint.get(key) for key in ("pretrained", "best_top1_acc")}
    return checkpoint | {"progress": progress, "fp16_scaler": checkpoint.get("amp")}
