"""Flags that the evaluation scripts have in common."""

import argparse
from collections.abc import Callable
from pathlib import Path

from shared.evaluation.flags import MINIMUM, add_labelled_flags, take_from_run
from shared.evaluation.frozen import eval_transform
from shared.images.loading import EvalTransform
from shared.networks.pretrained import find_file, flags_of_run, load_pretrained, size_flag
from shared.run.flags import Parser, check_minimum

from .hub import CARD, DEFAULT_MODEL, file_in
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
    add(f"--{file_flag}", default="", help="file in the folder --pretrained; by default its only checkpoint")
    return parser


def add_data_flags(parser: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    """Flags that choose labelled images; returns ``add_argument`` of their group."""
    add = add_labelled_flags(parser)
    root = "with --image_folder: --data_path <root_path>/<image_folder>"
    add("--root_path", "--root-path", default=None, help=root)
    add("--image_folder", "--image-folder", default=None, help="see --root_path")
    size = "side of the crops in pixels; None: that of the training's random views, else 224 (embedded images: 32)"
    add("--image_size", type=int, default=None, help=size)
    return add


def parse_with_images(
    parser: argparse.ArgumentParser, parse: Callable[[], argparse.Namespace], embedded_defaults: dict, folder: str = ""
) -> argparse.Namespace:
    """Parse; without images the defaults are those of the embedded materials.

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
    """:func:`parse_with_images` for an evaluation, which takes the run on the embedded materials, and checks."""
    args = parse_with_images(parser, parse, {"pretrained": CARD.embedded_run, **embedded_defaults})
    check_minimum(parser, args, MINIMUM)
    return args


def load_chosen_encoder(args: argparse.Namespace, file_flag: str = "fname") -> VisionTransformer:
    """The encoder that the flags of :func:`network_parser` choose.

    Fills in ``model_name``, ``image_size`` and the file where they were left to the checkpoint.
    """
    path: str | Path = "random"
    if args.pretrained != "random":
        path = file_in(args.pretrained, getattr(args, file_flag), file_flag)
        path = find_file(CARD, args.model_name or DEFAULT_MODEL, path)
    trained_with = flags_of_run(path, CARD)
    if trained_with.get("model_name") not in ARCHITECTURES:
        trained_with = {}
    names, defaults = {"model_name": "model_name"}, {"model_name": DEFAULT_MODEL}
    if "data_path" in args:  # pictures and files of the export have sizes of their own
        names["image_size"] = size_flag(trained_with)
        defaults["image_size"] = 32 if args.data_path is None else 224
    take_from_run(args, trained_with, names, defaults)
    if args.pretrained and Path(args.pretrained).is_dir():
        setattr(args, file_flag, Path(path).name)
    return load_pretrained(CARD, args.model_name, path, args.checkpoint_key, args.allow_partial)


def load_frozen(args: argparse.Namespace, file_flag: str = "fname") -> tuple[VisionTransformer, EvalTransform]:
    """The same encoder, and the centre crops that it takes."""
    encoder = load_chosen_encoder(args, file_flag)
    return encoder, eval_transform(CARD, args.image_size, encoder)
