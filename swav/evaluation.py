"""Flags that choose the network of an evaluation, and the network that they choose."""

import argparse

from shared.evaluation.flags import take_from_run
from shared.evaluation.frozen import eval_transform
from shared.images.loading import EvalTransform
from shared.networks.pretrained import flags_of_run, size_flag
from shared.run.flags import Parser

from .hub import CARD, load_backbone
from .resnet50 import PrototypeNetwork

DEFAULTS = {"arch": "resnet50", "image_size": 224}
EMBEDDED = {"arch": "test_resnet", "image_size": 32}  # of the network that main_swav.py trains on the embedded data


def evaluation_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser with the flags that choose the network.

    Args:
        docstring: Of the script; its first paragraph is the description.
    """
    parser = Parser(docstring)
    add = parser.add_argument_group("network").add_argument
    names = "resnet50, resnet50w2, resnet50w4, resnet50w5; torchvision's, timm's models"
    add("--arch", default=None, help=f"{names}; None: that of the training, else resnet50")
    weights = "a file of any layout, a release (swav_200ep), or random; by default the architecture's released weights"
    add("--pretrained", default="", help=weights)
    add("--allow_partial", action="store_true", help="go on when the file does not fill the network")
    return parser


def choose_network(args: argparse.Namespace) -> None:
    """Fill in the flags that were left to the checkpoint of a run, or to the defaults."""
    names, trained_with = {"arch": "arch"}, flags_of_run(args.pretrained, CARD)
    if "data_path" in args:  # images, which are seen as in the training
        names["image_size"] = size_flag(trained_with)
    defaults = EMBEDDED if "data_path" in args and not args.data_path else DEFAULTS
    take_from_run(args, trained_with, names, defaults)


def load_chosen(args: argparse.Namespace) -> PrototypeNetwork:
    """The network that the flags of :func:`evaluation_parser` choose, without heads."""
    choose_network(args)
    return load_backbone(args.arch, args.pretrained, args.allow_partial)


def load_frozen(args: argparse.Namespace) -> tuple[PrototypeNetwork, EvalTransform]:
    """The same network, and the centre crops that it takes."""
    network = load_chosen(args)
    return network, eval_transform(CARD, args.image_size, network)
