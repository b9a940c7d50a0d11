"""Write a trained trunk for other programs; a file is kept once it has given the torch network's output.

    python -m swav.export --arch resnet50 --pretrained checkpoint.pth.tar --output_dir out

Writes the formats of :func:`shared.networks.export.export_network`. Needs the packages of
``pip install -e '.[export]'``.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from shared import distributed
from shared.networks.export import add_export_flags, export_backbone
from swav.evaluation import evaluation_parser, load_chosen
from swav.hub import CARD


def get_args_parser() -> argparse.ArgumentParser:
    return add_export_flags(evaluation_parser(__doc__))


def export(args: argparse.Namespace) -> dict[str, Path]:
    """The files by format."""
    network = load_chosen(args)
    return export_backbone(CARD, network, args.arch, args.output_dir, args.image_size, args.pretrained)


def main() -> None:
    distributed.run_script(export, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
