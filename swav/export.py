"""Write a trained trunk for other programs; a file is kept once it has given the torch network's output.

    python -m swav.export --arch resnet50 --pretrained checkpoint.pth.tar --output_dir out

Writes ``<arch>.safetensors`` (names of the published checkpoints), ``<arch>_torchvision.pth`` or ``<arch>_timm.pth`` (a
state dict that these libraries load) and ``<arch>.onnx`` (any batch size). Needs the packages of
``pip install -e '.[export]'``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import distributed
from shared.networks.export import export_backbone
from swav.evaluation import evaluation_parser
from swav.hub import CARD, load_backbone, trunk_of
from swav.resnet50 import PrototypeNetwork

IMAGE_PX = 224


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument_group("export").add_argument
    add("--output_dir", default=".", help="where the files go")
    add("--image_size", type=int, nargs=2, default=(IMAGE_PX, IMAGE_PX), help="height and width in pixels that the "
        "ONNX file takes")  # fmt: skip
    return parser


def export(
    network: PrototypeNetwork, arch: str, output_dir: str | Path, image_size: Sequence[int] = (IMAGE_PX, IMAGE_PX)
) -> dict[str, Path]:
    """:func:`shared.networks.export.export_backbone` for the trunk of a network without heads."""
    return export_backbone(CARD, trunk_of(network), arch, output_dir, image_size)


def main() -> None:
    with distributed.clean_exit():
        args = get_args_parser().parse_args()
        network = load_backbone(args.arch, args.pretrained, args.allow_partial)
        export(network, args.arch, args.output_dir, args.image_size)


if __name__ == "__main__":
    main()
