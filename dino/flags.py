"""Flags that choose the frozen backbone of an evaluation, and the backbone that they choose."""

import argparse
from pathlib import Path

from torch import nn

from shared.evaluation.flags import take_from_run
from shared.evaluation.frozen import eval_transform
from shared.images.loading import EvalTransform
from shared.networks.pretrained import flags_of_run, size_flag
from shared.run import randomness
from shared.run.flags import Parser

from .hub import CARD, load_pretrained, plain_name

EMBEDDED = {"arch": "vit_micro", "patch_size": 4, "image_size": 32}  # what main_dino.py trains without images
NETWORK_OF_RUN = {"arch": "arch", "patch_size": "patch_size"}  # what the training calls these flags


def evaluation_parser(docstring: str, arch: str = "vit_small", patch_size: int = 16) -> argparse.ArgumentParser:
    """A parser with the flags that choose the frozen backbone; the defaults hold where the checkpoint does not say."""
    parser = Parser(docstring)
    parser.set_defaults(network_defaults={"arch": arch, "patch_size": patch_size})
    add = parser.add_argument_group("backbone").add_argument
    names = "vit_tiny, vit_small, vit_base, or any torchvision or timm model name"
    add("--arch", default=None, help=f"{names}; None: that of the training, else {arch}")
    add("--patch_size", type=int, default=None, help=f"of a ViT, in pixels; None: likewise, else {patch_size}")
    add("--pretrained_weights", default="", help="a file of any layout; random; without it the released weights")
    add("--allow_partial", action="store_true", help="load what fits when the weights do not fill the network")
    add("--checkpoint_key", default="teacher", help="network to take from a training checkpoint")
    return parser


def choose_network(args: argparse.Namespace) -> None:
    """Fill in the flags that were left to the checkpoint of a run, or to the defaults."""
    args.arch = plain_name(args.arch)
    names, defaults, trained_with = NETWORK_OF_RUN, args.network_defaults, flags_of_run(args.pretrained_weights, CARD)
    if "val_path" in args:  # labelled images, which are seen as in the training
        names = names | {"image_size": size_flag(trained_with)}
        defaults = defaults | ({"image_size": 224} if args.data_path else EMBEDDED)
    take_from_run(args, trained_with, names, defaults)


def load_chosen(args: argparse.Namespace, weights: str | Path | None = None) -> tuple[nn.Module, int]:
    """The frozen backbone that the flags of :func:`evaluation_parser` name and its D; with other weights if given."""
    choose_network(args)
    weights = args.pretrained_weights if weights is None else weights
    if weights == "random":
        randomness.seed_everything(getattr(args, "seed", 0))  # the same network on every process
    return load_pretrained(args.arch, args.patch_size, weights, args.checkpoint_key, args.allow_partial)


def load_frozen(args: argparse.Namespace) -> tuple[nn.Module, EvalTransform]:
    """The same backbone, and the centre crops that it takes."""
    backbone, _ = load_chosen(args)
    return backbone, eval_transform(CARD, args.image_size, backbone)
