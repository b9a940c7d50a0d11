"""Write a trained encoder for other programs; a file is kept once it has given the torch network's output.

    python -m msn.export --model_name deit_small --pretrained /path/to/run --fname msn-latest.pth.tar --output_dir out

Writes ``<model>.safetensors`` (names of the published checkpoints), ``<model>_timm.pth`` (a state dict for timm) and
``<model>.onnx`` (any batch size). Needs the packages of ``pip install -e '.[export]'``.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from msn.flags import load_chosen_encoder, network_parser
from msn.hub import CARD
from msn.vision_transformer import VisionTransformer, interpolate_positions
from shared import distributed
from shared.networks.export import export_backbone


def get_args_parser() -> argparse.ArgumentParser:
    parser = network_parser(__doc__)
    add = parser.add_argument_group("export").add_argument
    add("--output_dir", default=".", help="where the files go")
    size = "side in pixels of the images that the ONNX file takes; by default that of the position embeddings"
    add("--image_size", type=int, default=None, help=size)
    return parser


def timm_name(model_name: str) -> str:
    """What timm calls a network of this width and depth, if it has it."""
    return f"vit_{model_name.removeprefix('deit_').split('_')[0]}_patch16_224"


def at_size(encoder: VisionTransformer, image_size: Sequence[int]) -> VisionTransformer:
    """A copy with position embeddings for images of this size, which need no interpolation in the ONNX file."""
    grid = [side // encoder.patch_embed.patch_size for side in image_size]
    network = copy.deepcopy(encoder)
    network.pos_embed = nn.Parameter(interpolate_positions(encoder.pos_embed, *grid).detach())
    return network


def export(
    encoder: VisionTransformer, model_name: str, output_dir: str | Path, image_size: int | None = None
) -> dict[str, Path]:
    """:func:`shared.networks.export.export_backbone` for an encoder of this folder and square images."""
    size = None if image_size is None else [image_size] * 2
    name = timm_name(model_name)
    return export_backbone(CARD, encoder, model_name, output_dir, size, name, at_size, arch_key="name")


def main() -> None:
    with distributed.clean_exit():
        args = get_args_parser().parse_args()
        encoder = load_chosen_encoder(args)
        export(encoder, args.model_name, args.output_dir, args.image_size)


if __name__ == "__main__":
    main()
