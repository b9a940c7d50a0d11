"""Flags of the evaluation scripts, and the frozen networks and images that they ask for."""

import argparse
from collections.abc import Callable, Sequence

from shared.evaluation import flags
from shared.images.loading import EvalTransform
from shared.networks.pretrained import flags_of_run, size_flag
from shared.run.flags import Parser
from shared.supervised.transforms import eval_transform

from .hub import CARD, load_network
from .resmlp_models import ResMLP

CROP_RATIO = 0.875  # of the evaluations of self-supervised features: 224 of 256 pixels


def evaluation_parser(docstring: str) -> Parser:
    """A parser with the flags that choose the frozen network; the description is the docstring's first paragraph."""
    parser = Parser(docstring)
    add = parser.add_argument_group("network").add_argument
    weights = "a release (resmlp_24_dino), a file or an address; without --data_path the run in runs/materials"
    add("--pretrained_weights", default="", help=weights)
    key = "network to take from a training checkpoint; of a checkpoint of DINO, model is the teacher"
    add("--checkpoint_key", default=CARD.checkpoint_key, help=key)
    size = "side of the centre crop in pixels; None: that of the weights, else cross-patch layers are interpolated"
    add("--image_size", type=int, default=None, help=size)
    return parser


def add_data_flags(parser: argparse.ArgumentParser) -> Callable:
    """Flags that choose labelled images; returns ``add_argument`` of their group."""
    add = flags.add_labelled_flags(parser)
    add("--batch_size", "--batch_size_per_gpu", type=int, default=128, help="images per process")
    return add


def parse_evaluation(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, **embedded_defaults
) -> argparse.Namespace:
    """Parse; without ``--data_path`` the defaults are those of the run on the embedded materials."""
    args = flags.parse_evaluation(parser, arguments, pretrained_weights=CARD.embedded_run, **embedded_defaults)
    if not args.pretrained_weights:
        parser.error(f"--pretrained_weights is missing: a file, or one of {', '.join(CARD.releases)}")
    return args


def load_frozen(args: argparse.Namespace) -> tuple[ResMLP, EvalTransform]:
    """The network without a classifier, images to features (B, D), and the centre crops that it takes."""
    trained_with = flags_of_run(args.pretrained_weights)
    left_open = {} if args.image_size else {"image_size": size_flag(trained_with)}
    flags.take_from_run(args, trained_with, left_open, {})
    network = load_network(args.pretrained_weights, args.checkpoint_key, args.image_size)
    in_chans = network.patch_embed.proj.in_channels
    return network, eval_transform(network.img_size, CARD.mean, CARD.std, CROP_RATIO, in_chans)
