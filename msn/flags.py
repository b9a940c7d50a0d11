"""Flags that the evaluation scripts have in common."""

import argparse
from collections.abc import Callable
from pathlib import Path

from shared import distributed
from shared.evaluation import frozen
from shared.images.loading import default_num_workers
from shared.images.sources import ImageSource
from shared.run.flags import Parser

from .hub import DEFAULT_MODEL, RUN_ON_DIGITS, load_pretrained
from .vision_transformer import ARCHITECTURES, VisionTransformer


def network_parser(docstring: str, file_flag: str = "fname", file_group: str = "meta") -> argparse.ArgumentParser:
    """A parser with the flags that choose the pre-trained encoder, spelt with - or _.

    Args:
        docstring: Of the script; its first paragraph is the description.
        file_flag: Flag for the file in the folder --pretrained.
        file_group: Title of its group.
    """
    # flags of the processes, which accept cuda:0, take the place of those of shared.run.flags
    parser = Parser(docstring, conflict_handler="resolve")
    add = parser.add_argument_group("meta").add_argument
    names = f"{', '.join(ARCHITECTURES)}; None: that of the training, {DEFAULT_MODEL} where the file does not say"
    add("--model_name", "--model-name", default=None, choices=tuple(ARCHITECTURES), metavar="NAME", help=names)
    pretrained = f"folder of --{file_flag}, a file of any layout, or random; without either the released weights"
    add("--pretrained", default="", help=pretrained)
    add("--checkpoint_key", default="target_encoder", help="network to take from a training checkpoint")
    add("--allow_partial", action="store_true", help="load what fits when the weights do not fill the network")
    add = parser.add_argument_group(file_group).add_argument if file_group != "meta" else add
    add(f"--{file_flag}", default="", help="file in the folder --pretrained; by default its only *-latest.pth.tar")
    return parser


def add_data_flags(parser: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    """Flags that choose labelled images, those to learn from and those to classify.

    Returns:
        ``add_argument`` of their group.
    """
    add = parser.add_argument_group("data").add_argument
    images = "folder with train/ and val/, or one folder per class; .txt list; torchvision name; default: digits"
    add("--data_path", default=None, help=images)
    add("--val_path", default=None, help="images to classify; by default those that belong to --data_path")
    root = "with --image_folder: --data_path <root_path>/<image_folder>"
    add("--root_path", "--root-path", default=None, help=root)
    add("--image_folder", "--image-folder", default=None, help="see --root_path")
    add("--allow_absolute_paths", action="store_true", help="in .txt lists")
    size = "side of the crops in pixels; None: that of the training's random views, else 224, or 16 for the digits"
    add("--image_size", type=int, default=None, help=size)
    return add


def add_process_flags(parser: argparse.ArgumentParser, title: str = "processes") -> None:
    """Device and loader flags, and those of the launcher, in the group ``title``."""
    add = parser.add_argument_group(title).add_argument
    add("--num_workers", type=int, default=None, help="per rank; None: cores per rank less one, at most 10")
    kinds, number = ("auto", "cpu", "cuda"), "auto: a GPU if there is one; the number of cuda:0 is ignored"
    add("--device", type=device_name, default="auto", choices=kinds, help=number)
    add("--dist_url", default="env://", help="rendezvous of the processes")
    add("--local_rank", "--local-rank", type=int, default=0, help="ignored: read from the environment")


def device_name(text: str) -> str:
    """``cuda`` of ``cuda:0``: launchers give each process its GPU."""
    return text.split(":")[0]


def parse_with_images(
    parser: argparse.ArgumentParser, parse: Callable[[], argparse.Namespace], embedded_defaults: dict, folder: str = ""
) -> argparse.Namespace:
    """Parse; without images the defaults are those of the embedded digits.

    Args:
        parse: Parses the command line with the parser's present defaults.
        folder: Of the images, in <root_path>/<image_folder>.
    """
    args = parse()
    if args.data_path is not None:
        return args
    if (args.root_path is None) != (args.image_folder is None):
        parser.error("--root_path and --image_folder need each other; or give --data_path")
    if args.root_path is not None:
        args.data_path = str(Path(args.root_path, args.image_folder, folder))
        return args
    parser.set_defaults(**embedded_defaults)
    return parse()


def finish(
    parser: argparse.ArgumentParser, parse: Callable[[], argparse.Namespace], **embedded_defaults
) -> argparse.Namespace:
    """Parse and check; without images the defaults are those of the embedded digits and of the run on them.

    Args:
        parse: As for :func:`parse_with_images`.
        embedded_defaults: Further defaults for the digits.
    """
    args = parse_with_images(parser, parse, {"pretrained": RUN_ON_DIGITS, **embedded_defaults})
    for flag in ("epochs", "batch_size", "image_size", "val_freq", "num_blocks"):
        if (value := getattr(args, flag, None)) is not None and value < 1:
            parser.error(f"--{flag} {value} is less than 1")
    if args.num_workers is None:
        args.num_workers = default_num_workers()
    return args


def load_chosen_encoder(args: argparse.Namespace, file_flag: str = "fname") -> VisionTransformer:
    """The encoder that the flags of :func:`network_parser` choose.

    Fills in ``model_name``, ``image_size`` and the file where they were left to the checkpoint.

    Raises:
        ValueError: If there are no such weights, or they do not fill the network.
    """
    found = load_pretrained(
        args.model_name, args.pretrained, getattr(args, file_flag), args.checkpoint_key, args.allow_partial, file_flag
    )
    if args.model_name is None and found.trained_with:
        distributed.print_once(f"--model_name {found.model_name}, as in the training")
    args.model_name = found.model_name
    if args.pretrained and Path(args.pretrained).is_dir():
        setattr(args, file_flag, found.path.name)
    if "data_path" in args and args.image_size is None:  # pictures and files of the export have sizes of their own
        args.image_size = found.trained_with.get("rand_size") or (16 if args.data_path is None else 224)
        distributed.print_once(f"--image_size {args.image_size}")
    return found.encoder


def labelled_sources(args: argparse.Namespace, num_classes: int | None = None) -> tuple[ImageSource, ImageSource]:
    """Train and val images with at most ``num_classes`` classes."""
    sources = frozen.labelled_sources(args.data_path, args.val_path, args.allow_absolute_paths, num_classes=num_classes)
    for source in sources:
        distributed.print_once(source.describe())
    return sources
