"""Where the class token looks: self-attention of the last block, head by head.

    python visualize_attention.py                            # an embedded digit, weights of the run in runs/digits
    python visualize_attention.py --image_path photo.jpg     # released ViT-S/16
    python visualize_attention.py --image_path photo.jpg --pretrained /path/to/run --fname msn-latest.pth.tar

``attention.png`` shows everything on one sheet; each map is also a file of its own.
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from msn.flags import load_chosen_encoder, network_parser
from msn.hub import MEAN, RUN_ON_DIGITS, STD
from msn.vision_transformer import VisionTransformer
from shared import distributed
from shared.images.decode import read_image
from shared.images.sources import open_source
from shared.multicrop import normalize_views
from shared.networks.backbones import input_channels
from shared.pictures.attention import save_attention_maps

DIGIT = 5  # the embedded image whose attention is shown by default


def get_args_parser() -> argparse.ArgumentParser:
    parser = network_parser(__doc__)
    add = parser.add_argument_group("image").add_argument
    add("--image_path", default=None, help="any image file")
    add("--image_size", type=int, nargs="+", default=[480, 480], help="height and width, or the short side, in pixels")
    add("--threshold", type=float, default=None, help="also show the patches that hold this share of the attention")
    add("--output_dir", default=".", help="where the pictures go")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; with neither image nor weights the defaults are those of the embedded digits."""
    parser = get_args_parser()
    args = parser.parse_args(arguments)
    args.embedded = args.image_path is None and not args.pretrained and not args.fname
    if args.embedded:
        parser.set_defaults(pretrained=RUN_ON_DIGITS, image_size=[32, 32], output_dir="runs/digits/attention")
        args = argparse.Namespace(**vars(parser.parse_args(arguments)), embedded=True)
    if args.threshold is not None and not 0 < args.threshold <= 1:
        parser.error(f"--threshold {args.threshold} is not in (0, 1]")
    if len(args.image_size) > 2 or min(args.image_size) < 1:
        parser.error(f"--image_size {args.image_size}: give one or two positive numbers")
    return args


@torch.no_grad()
def class_attention(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """Attention of the class token to the patches in the last block.

    Args:
        images: Normalised, shape (B, C, H, W); rows and columns beyond a multiple of the patch size are not seen.

    Returns:
        Shape (B, heads, H / patch, W / patch); the share of the class token itself is missing from the sum of 1.
    """
    patch_size = encoder.patch_embed.patch_size
    rows, columns = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    return encoder.get_last_selfattention(images, num_queries=1)[:, :, 0, 1:].unflatten(2, (rows, columns))


def save_attention(
    encoder: VisionTransformer, image: Tensor, output_dir: str | Path, threshold: float | None = None
) -> list[Path]:
    """The attention of one image as pictures, see :func:`shared.pictures.attention.save_attention_maps`.

    Args:
        image: Normalised, shape (C, H, W), on the encoder's device.
    """
    training = encoder.training
    attention = class_attention(encoder.eval(), image[None])[0]
    encoder.train(training)
    return save_attention_maps(attention, image, encoder.patch_embed.patch_size, output_dir, MEAN, STD, threshold)


def prepare_image(pixels: np.ndarray, image_size: list[int], in_chans: int = 3) -> Tensor:
    """Resize and normalise RGB pixels (H, W, 3), uint8, to (in_chans, height, width).

    Args:
        image_size: Height and width in pixels, or the short side.
        in_chans: 3, or 1 for the luminance.
    """
    height, width = pixels.shape[:2]
    if len(image_size) == 1:
        short = min(height, width)
        image_size = [int(image_size[0] * height / short), int(image_size[0] * width / short)]
    resized = cv2.resize(pixels, image_size[::-1], interpolation=cv2.INTER_AREA)
    if in_chans == 1:
        resized = cv2.cvtColor(resized, cv2.COLOR_RGB2GRAY)[..., None]
    return normalize_views([torch.from_numpy(resized).permute(2, 0, 1)[None]], "cpu", MEAN, STD)[0][0]


def visualize_attention(args: argparse.Namespace) -> list[Path]:
    """Write the pictures that the flags ask for."""
    device = distributed.init(device=args.device)
    encoder = load_chosen_encoder(args)
    encoder.to(device)
    if args.image_path is not None:
        pixels = read_image(args.image_path).decode()
    elif args.embedded:
        pixels = open_source(None, "val").load(DIGIT).decode()
    else:
        from sklearn.datasets import load_sample_image  # a second of SciPy, of which the training needs nothing

        pixels = load_sample_image("flower.jpg")
    image = prepare_image(pixels, args.image_size, input_channels(encoder)).to(device)
    paths = save_attention(encoder, image, args.output_dir, args.threshold)
    print(f"{paths[0]}, and {len(paths) - 1} pictures of single maps beside it")
    return paths


def main() -> None:
    with distributed.clean_exit():
        visualize_attention(parse_args())


if __name__ == "__main__":
    main()
