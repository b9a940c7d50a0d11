"""Where the class token looks: self-attention of the last block, head by head.

    python visualize_attention.py                            # an embedded image, weights of the run in runs/materials
    python visualize_attention.py --image_path photo.jpg     # released ViT-S/16
    python visualize_attention.py --image_path photo.jpg --pretrained /path/to/run --fname msn-latest.pth.tar

``attention.png`` shows everything on one sheet; each map is also a file of its own.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from msn.flags import load_chosen_encoder, network_parser
from msn.hub import CARD, MEAN, STD
from shared import distributed
from shared.networks.backbones import input_channels
from shared.pictures.attention import (
    add_image_flags,
    chosen_image,
    parse_image_flags,
    prepare_image,
    save_attention,
)


def get_args_parser() -> argparse.ArgumentParser:
    parser = network_parser(__doc__)
    add_image_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; with neither image nor weights the defaults are those of the embedded images."""
    return parse_image_flags(get_args_parser(), arguments, ("pretrained", "fname"), {"pretrained": CARD.embedded_run})


def visualize_attention(args: argparse.Namespace) -> list[Path]:
    """Write the pictures that the flags ask for."""
    device = distributed.init(device=args.device)
    encoder = load_chosen_encoder(args).to(device)
    image = prepare_image(chosen_image(args), args.image_size, MEAN, STD, input_channels(encoder)).to(device)
    paths = save_attention(encoder, image, args.output_dir, MEAN, STD, args.threshold)
    print(f"{paths[0]}, and {len(paths) - 1} pictures of single maps beside it")
    return paths


def main() -> None:
    distributed.run_script(visualize_attention, parse_args)


if __name__ == "__main__":
    main()
