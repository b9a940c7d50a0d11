"""What PAWS and SuNCEt have in common: batches of all images and of labelled ones, the encoder, the checkpoints."""

import argparse
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from shared import distributed
from shared.images.loading import BadImages, EpochBatchSampler, make_loader, short_side
from shared.images.sources import ask_about_classes
from shared.images.training_data import write_recipes
from shared.multicrop import MultiCropDataset
from shared.networks.batchnorm import synchronize_batchnorm
from shared.networks.compiling import compile_network
from shared.optimisation.accumulation import accumulate
from shared.run import randomness
from shared.run.checkpoint import CheckpointError, load_latest
from shared.run.run import Run
from shared.run.settings import long_warmup, tell_settings

from .augmentations import Recipe, paws_views, support_views
from .encoder import build_encoder
from .hub import load_backbone_into
from .labels import PartlyLabelled, open_images
from .losses import support_labels
from .support_sampler import MOST_SUPPORTS, SupportSampler

NETWORK_FLAGS = ("model_name", "in_chans", "output_dim", "use_pred_head")
SUPPORT_VIEWS = 1  # number of the stream of random numbers of the supports' views


@dataclass
class TrainingData:
    """Unlabelled and labelled batches of this process.

    Attributes:
        dataset: Views of all images.
        unlabelled: Batches (views, labels, indices) of all images, labelled ones too; their labels are not looked at.
        supports: Batches of labelled images, as many as of ``unlabelled``.
        support_labels: Smoothed labels of the supports of a step, see :func:`paws.losses.support_labels`.
        batch_size: Unlabelled images per step, on all processes.
        checksum: Of images and labels, the same on every process.
    """

    images: PartlyLabelled
    dataset: MultiCropDataset
    unlabelled: DataLoader
    supports: DataLoader
    support_labels: Tensor
    batch_size: int
    checksum: int

    @property
    def steps_per_epoch(self) -> int:
        return len(self.unlabelled)

    def set_epoch(self, epoch: int, start_step: int) -> None:
        for loader in (self.unlabelled, self.supports):
            loader.batch_sampler.set_epoch(epoch, start_step)

    def __iter__(self) -> Iterator:
        return zip(self.unlabelled, self.supports, strict=True)


def open_training_data(
    args: argparse.Namespace, recipe: Recipe, output_dir: Path, device: torch.device
) -> TrainingData:
    """Open the images and labels, and make the loaders of both kinds of batches."""
    images = open_images(args)
    source = images.source
    ask_about_classes(images.classes)
    checksum = zlib.crc32(images.labels, source.checksum())
    distributed.check_same_on_all_processes((len(source), checksum), "the training data (number of images, checksum)")
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    choose_supports(args, images, world_size)
    tell_settings(args, long_warmup("--warmup", args.warmup, args.epochs))

    views = paws_views(recipe, args.multicrop, args.color_jitter_strength)
    bad_images = BadImages(len(source), output_dir / "bad_images.txt", args.on_bad_image, args.max_bad_fraction)
    write_recipes(output_dir, views)
    dataset = MultiCropDataset(source, views, args.seed, args.augmentation, args.in_chans, bad_images)
    flag = "--unsupervised_batch_size"
    sampler = EpochBatchSampler(len(source), args.unsupervised_batch_size, args.seed, rank, world_size, flag=flag)

    support_set = MultiCropDataset(
        source,
        support_views(recipe, args.multicrop, args.color_jitter_strength, args.supervised_views),
        randomness.derive_seed(args.seed, SUPPORT_VIEWS),
        args.augmentation,
        args.in_chans,
        BadImages(len(source), on_bad_image="error"),  # a replacement could be of another class
    )
    support_sampler = SupportSampler(
        images.labels,
        args.supervised_imgs_per_class,
        args.classes_per_batch,
        len(sampler),
        args.seed,
        rank,
        world_size,
        args.unique_classes_per_rank,
        class_names=images.classes,
    )
    labels = support_labels(
        args.supervised_imgs_per_class,
        args.classes_per_batch,
        world_size,
        args.unique_classes_per_rank,
        args.label_smoothing,
        args.supervised_views,
    )
    distributed.print_once(
        f"{len(sampler)} steps per epoch, each of {args.unsupervised_batch_size} images and "
        f"{args.classes_per_batch} x {args.supervised_imgs_per_class} supports on each of {world_size} process(es)"
    )
    if args.data_path is not None and (side := short_side(source)) < recipe.large[0]:
        distributed.print_once(f"images of {side} pixels, less than views of {recipe.large[0]}, are enlarged")
    unlabelled, supports = (
        make_loader(part, batch_sampler=batches, num_workers=args.num_workers, device=device)
        for part, batches in ((dataset, sampler), (support_set, support_sampler))
    )
    batch_size = args.unsupervised_batch_size * world_size
    return TrainingData(images, dataset, unlabelled, supports, labels.to(device), batch_size, checksum)


def choose_supports(args: argparse.Namespace, images: PartlyLabelled, world_size: int) -> None:
    """Fill in ``--classes_per_batch`` and ``--supervised_imgs_per_class`` where they were not given."""
    if args.classes_per_batch is None:
        args.classes_per_batch = len(images.classes) // (world_size if args.unique_classes_per_rank else 1)
    if args.supervised_imgs_per_class is None:
        share = 1 if args.unique_classes_per_rank or images.fewest < world_size else world_size
        args.supervised_imgs_per_class = min(MOST_SUPPORTS, images.fewest // share)


def new_encoder(args: argparse.Namespace, recipe: Recipe, device: torch.device) -> nn.Module:
    """The encoder that the flags describe, wrapped for several processes; its backbone may be a trained one."""
    encoder = build_encoder(args.model_name, args.output_dim, args.use_pred_head, recipe.large[0], args.in_chans)
    if args.pretrained is not None:
        load_backbone_into(encoder, args.model_name, args.pretrained, args.allow_partial)
    encoder = synchronize_batchnorm(encoder, device).to(device)
    if args.compile:
        compile_network(encoder)
    accumulate(encoder, args.accumulate)
    return distributed.wrap(encoder, device)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def resume(
    run: Run,
    data: TrainingData,
    total_steps: int,
    read_checkpoint: str | None,
    encoder: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Go on from the run's newest checkpoint; while it has none, from that of ``--read_checkpoint``.

    Raises:
        CheckpointError: If that is not in the output folder.
    """
    checkpoint = load_latest(run.path)
    if checkpoint is None and read_checkpoint is not None:
        checkpoint = load_latest(run.output_dir / read_checkpoint)
        if checkpoint is None:
            raise CheckpointError(f"--read_checkpoint {read_checkpoint}: there is no such file in {run.output_dir}")
    layout = {"to_official": to_official, "from_official": from_official}
    checkpoint = checkpoint or {}
    run.resume(data, total_steps, NETWORK_FLAGS, checkpoint=checkpoint, **layout, encoder=encoder, opt=optimizer)


def to_official(state: dict) -> dict:
    """The state of a run with the keys of the official checkpoints.

    The position in the supports needs no state of its own: what a step gets is a function of its number.
    """
    amp, args = state.pop("fp16_scaler"), state["args"]
    return state | {
        "unlabel_prob": args["unlabeled_frac"],
        "s_batch_size": args["supervised_imgs_per_class"],
        "u_batch_size": args["unsupervised_batch_size"],
        "lr": args["lr"],
        "temperature": args["temperature"],
        "amp": amp,
    }


def from_official(checkpoint: dict) -> dict:
    return checkpoint | {"fp16_scaler": checkpoint.get("amp")}


def numbered_checkpoint(args: argparse.Namespace, epoch: int) -> str | None:
    """Name under which the checkpoint of this epoch (from 0) stays; None for most epochs."""
    done = epoch + 1
    due = args.checkpoint_freq > 0 and done % args.checkpoint_freq == 0
    return f"{args.write_tag}-ep{done}.pth.tar" if due else None
