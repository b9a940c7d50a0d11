"""Write a trained backbone for other programs; a file is kept once it has given the torch network's output.

    python -m dino.export --arch vit_small --patch_size 16 --pretrained_weights checkpoint.pth --output_dir out

Writes the formats of :func:`shared.networks.export.export_network` and, of a ViT, ``<arch>_transformers`` (a folder for
``transformers.ViTModel``). Needs the packages of ``pip install -e '.[export]'``.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from dino.flags import evaluation_parser, load_chosen
from dino.hub import CARD, VIT_NAMES, plain_name
from shared import distributed
from shared.networks.export import add_export_flags, export_backbone


def get_args_parser() -> argparse.ArgumentParser:
    return add_export_flags(evaluation_parser(__doc__))


def export(args: argparse.Namespace) -> dict[str, Path]:
    """The files by format."""
    backbone, _ = load_chosen(args)
    ours = (f"{plain_name(args.arch)}_patch16_224", "ViTModel") if args.arch in VIT_NAMES else ()
    origin = args.pretrained_weights
    return export_backbone(CARD, backbone, args.arch, args.output_dir, args.image_size, origin, *ours)


def main() -> None:
    distributed.run_script(export, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
