"""Flags that the evaluation scripts have in common."""

import argparse
from collections.abc import Callable
from pathlib import Path

from torch import nn

from shared.images.loading import default_num_workers
from shared.run.flags import Parser

from .hub import RUN_ON_DIGITS, load_pretrained

# for the embedded 8x8 pixel digits and the network that main_dino.py trains on them
EMBEDDED_DATA_DEFAULTS = {"patch_size": 4, "image_size": 12, "pretrained_weights": RUN_ON_DIGITS}


def evaluation_parser(docstring: str, arch: str = "vit_small", patch_size: int = 16) -> argparse.ArgumentParser:
    """A parser with the flags that choose the frozen backbone.

    Args:
        docstring: Of the script; its first paragraph is the description.
        arch: Default architecture.
        patch_size: Default patch size in pixels.
    """
    parser = Parser(docstring)
    add = parser.add_argument_group("backbone").add_argument
    add("--arch", default=arch, help="vit_tiny, vit_small, vit_base, or any torchvision or timm model name")
    add("--patch_size", type=int, default=patch_size, help="side of the ViT's patches in pixels")
    add("--pretrained_weights", default="", help="a file of any layout; random; without it the released weights")
    add("--allow_partial", action="store_true", help="load what fits when the weights do not fill the network")
    add("--checkpoint_key", default="teacher", help="network to take from a training checkpoint")
    return parser


def add_data_flags(parser: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    """Flags that choose labelled images, those to learn from and those to classify.

    Returns:
        ``add_argument`` of their group.
    """
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default=None, help="folder of train/ and val/ or of classes, .txt list or torchvision data set")
    add("--val_path", default=None, help="images to classify; by default those that belong to --data_path")
    add("--allow_absolute_paths", action="store_true", help="in .txt lists")
    return add


def add_process_flags(parser: argparse.ArgumentParser, launcher: bool = True) -> None:
    """Device and loader flags, and those of the launcher for scripts that run on several processes."""
    add = parser.add_argument_group("processes").add_argument
    add("--num_workers", type=int, default=default_num_workers(), help="loader processes per rank")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    if launcher:
        add("--dist_url", default="env://", help="rendezvous of the processes")
        add("--local_rank", "--local-rank", type=int, default=0, help="ignored: read from the environment")


def load_chosen(args: argparse.Namespace, weights: str | Path | None = None) -> tuple[nn.Module, int]:
    """The frozen backbone that the flags of :func:`evaluation_parser` name and its D; with other weights if given."""
    weights = args.pretrained_weights if weights is None else weights
    return load_pretrained(args.arch, args.patch_size, weights, args.checkpoint_key, args.allow_partial)
