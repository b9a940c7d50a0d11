"""Write a trained backbone for other programs; a file is kept once it has given the torch network's output.

    python -m dino.export --arch vit_small --patch_size 16 --pretrained_weights checkpoint.pth --output_dir out

Writes the formats of :func:`shared.networks.export.export_network` and, of a ViT, ``<arch>_transformers`` (a folder for
``transformers.ViTModel``). Needs the packages of ``pip install -e '.[export]'``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dino.flags import evaluation_parser, load_chosen
from dino.hub import CARD, VIT_NAMES, plain_name
from shared import distributed
from shared.networks.export import add_export_flags, export_backbone


def get_args_parser() -> argparse.ArgumentParser:
    return add_export_flags(evaluation_parser(__doc__))


def export(
    backbone: nn.Module, arch: str, output_dir: str | Path, image_size: Sequence[int] | None = None
) -> dict[str, Path]:
    """:func:`shared.networks.export.export_backbone` for a backbone of this folder."""
    ours = (f"{plain_name(arch)}_patch16_224", "ViTModel") if arch in VIT_NAMES else ()
    return export_backbone(CARD, backbone, arch, output_dir, image_size, *ours)


def main() -> None:
    with distributed.clean_exit():
        args = get_args_parser().parse_args()
        backbone, _ = load_chosen(args)
        export(backbone, args.arch, args.output_dir, args.image_size)


if __name__ == "__main__":
    main()
