"""Flags, images and networks that the evaluation scripts have in common."""

import argparse
from collections.abc import Callable

from shared.images.labelled import open_labelled
from shared.images.loading import default_num_workers
from shared.images.sources import ImageSource
from shared.supervised.transforms import eval_transform

from .augmentations import MEAN, STD
from .pretrained import RELEASES, RUN_ON_DIGITS, load_network
from .resmlp_models import ResMLP

CROP_RATIO = 0.875  # of the evaluations of self-supervised features: 224 of 256 pixels


def evaluation_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser with the flags that choose the frozen network; the description is the docstring's first paragraph."""
    parser = argparse.ArgumentParser(
        description=docstring.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("network").add_argument
    add("--pretrained_weights", default="", help="a release (resmlp_24_dino), a file of any layout or an address; "
        "without --data_path the run in runs/digits")  # fmt: skip
    add("--checkpoint_key", default="model", help="network to take from a training checkpoint; of a checkpoint of "
        "DINO, model is the teacher")  # fmt: skip
    add("--image_size", type=int, default=None, help="side of the centre crop in pixels; None: that of the weights, "
        "else the cross-patch layers are interpolated")  # fmt: skip
    return parser


def add_data_flags(parser: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    """Flags that choose labelled images; returns ``add_argument`` of their group."""
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default=None, help="folder with train/ and val/, a folder with one folder per class, a .txt "
        "list or a torchvision data set name; without it the embedded digits")  # fmt: skip
    add("--val_path", default=None, help="images to classify; by default those that belong to --data_path")
    add("--allow_absolute_paths", action="store_true", help="in .txt lists")
    add("--batch_size_per_gpu", type=int, default=128, help="images per process")
    return add


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Device and loader flags, and those of the launcher."""
    add = parser.add_argument_group("processes").add_argument
    add("--num_workers", type=int, default=default_num_workers(), help="loader processes per rank")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dist_url", default="env://", help="rendezvous of the processes")
    add("--local_rank", "--local-rank", type=int, default=0, help="ignored: read from the environment")


def parse_with_embedded_defaults(
    parser: argparse.ArgumentParser, arguments: list[str] | None, **defaults
) -> argparse.Namespace:
    """Parse; without ``--data_path``, ``defaults`` and the run on the embedded digits replace the usual defaults."""
    args = parser.parse_args(arguments)
    if args.data_path is None:
        parser.set_defaults(pretrained_weights=RUN_ON_DIGITS, **defaults)
        args = parser.parse_args(arguments)
    if not args.pretrained_weights:
        parser.error(f"--pretrained_weights is missing: a file, or one of {', '.join(RELEASES)}")
    return args


def labelled_sources(args: argparse.Namespace) -> tuple[ImageSource, ImageSource]:
    """Train and val images with classes. Raises ``ValueError`` if there are none."""
    return open_labelled(args.data_path, args.val_path, args.allow_absolute_paths)


def frozen_network(args: argparse.Namespace) -> ResMLP:
    """The network without a classifier: images to features (B, D)."""
    return load_network(args.pretrained_weights, args.checkpoint_key, args.image_size)


def centre_crops(network: ResMLP):
    """The transform that makes val images for a network."""
    in_chans = network.patch_embed.proj.in_channels
    return eval_transform(network.img_size, MEAN, STD, CROP_RATIO, in_chans)
