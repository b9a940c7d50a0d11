"""Flags of the evaluation scripts, and the frozen networks and images that they ask for."""

import argparse
from collections.abc import Callable

from shared.images.loading import EvalTransform, default_num_workers
from shared.run.flags import Parser, parse_with_embedded_defaults
from shared.supervised.transforms import eval_transform

from .hub import CARD, load_network
from .resmlp_models import ResMLP

CROP_RATIO = 0.875  # of the evaluations of self-supervised features: 224 of 256 pixels


def evaluation_parser(docstring: str) -> Parser:
    """A parser with the flags that choose the frozen network; the description is the docstring's first paragraph."""
    parser = Parser(docstring)
    add = parser.add_argument_group("network").add_argument
    weights = "a release (resmlp_24_dino), a file or an address; without --data_path the run in runs/digits"
    add("--pretrained_weights", default="", help=weights)
    key = "network to take from a training checkpoint; of a checkpoint of DINO, model is the teacher"
    add("--checkpoint_key", default=CARD.checkpoint_key, help=key)
    size = "side of the centre crop in pixels; None: that of the weights, else cross-patch layers are interpolated"
    add("--image_size", type=int, default=None, help=size)
    return parser


def add_data_flags(parser: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    """Flags that choose labelled images; returns ``add_argument`` of their group."""
    add = parser.add_argument_group("data").add_argument
    images = "folder with train/ and val/ or with class folders, .txt list or torchvision name; None: the digits"
    add("--data_path", default=None, help=images)
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


def parse_evaluation(
    parser: argparse.ArgumentParser, arguments: list[str] | None, minimum: dict[str, float], **embedded_defaults
) -> argparse.Namespace:
    """Parse; without ``--data_path`` the defaults are those of the run on the embedded digits."""
    embedded_defaults["pretrained_weights"] = CARD.run_on_digits
    args = parse_with_embedded_defaults(parser, arguments, embedded_defaults, minimum)
    if not args.pretrained_weights:
        parser.error(f"--pretrained_weights is missing: a file, or one of {', '.join(CARD.releases)}")
    return args


def frozen_network(args: argparse.Namespace) -> tuple[ResMLP, EvalTransform]:
    """The network without a classifier, images to features (B, D), and the centre crops that it takes."""
    network = load_network(args.pretrained_weights, args.checkpoint_key, args.image_size)
    in_chans = network.patch_embed.proj.in_channels
    return network, eval_transform(network.img_size, CARD.mean, CARD.std, CROP_RATIO, in_chans)
