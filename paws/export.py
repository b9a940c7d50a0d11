"""Write a trained backbone for other programs; a file is kept once it has given the torch network's output.

    python -m paws.export --model_name resnet50 --pretrained run/paws-latest.pth.tar --output_dir out

Writes the formats of :func:`shared.networks.export.export_network`, without the heads. Needs the packages of
``pip install -e '.[export]'``.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from paws.hub import CARD, recipe_of
from shared import distributed
from shared.evaluation.flags import take_from_run
from shared.networks.export import add_export_flags, export_backbone
from shared.networks.pretrained import flags_of_run, load_pretrained
from shared.run.flags import AnyDashParser


def get_args_parser() -> argparse.ArgumentParser:
    parser = AnyDashParser(__doc__)
    add = parser.add_argument
    add("--model_name", default=None, help="as for main.py; None: that of the training, else resnet50")
    add("--pretrained", required=True, help="a file of any layout, or the name of a release")
    add("--allow_partial", action="store_true", help="go on when the file does not fill the network")
    return add_export_flags(parser)


def export(args: argparse.Namespace) -> dict[str, Path]:
    """The files by format; they state the size, mean and spread of the images of the training."""
    trained_with = flags_of_run(args.pretrained, CARD)
    take_from_run(args, trained_with, {"model_name": "model_name"}, {"model_name": "resnet50"})
    backbone = load_pretrained(CARD, args.model_name, args.pretrained, allow_partial=args.allow_partial)
    recipe = recipe_of(trained_with, trained_with.get("image_size"))
    card, image_size = replace(CARD, mean=recipe.mean, std=recipe.std), args.image_size or recipe.large[:1]
    return export_backbone(
        card, backbone, args.model_name, args.output_dir, image_size, args.pretrained, arch_key="model_name"
    )


def main() -> None:
    distributed.run_script(export, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
