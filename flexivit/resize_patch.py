"""Change the patch size of any Vision Transformer.

    python resize_patch.py dino_vits16.pth vits_patch14.pth --patch 14 --image_size 224
    python resize_patch.py runs/materials/checkpoint.pth patch4.safetensors --patch 4

Takes files of DINO, MSN, timm and this folder. The patch embedding is resized by the pseudo-inverse of FlexiViT, which
is exact for larger patches; positions are resized to the grid of the new patches. The new file has the names and the
class token of a ViT of timm, and beside them what its tensors do not show: heads, GELU, mean and std of the images.
Prints the old size and the new one, and how far the features of images move: only training, or a network that was
trained for it, makes another patch size as good as the old one.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from flexivit.checkpoints import described, load_as_trained
from flexivit.flexible_vit import FlexiViT, pi_resize, resize_positions
from shared import distributed
from shared.images.labelled import open_val
from shared.images.loading import EvalDataset, EvalTransform
from shared.images.sources import open_source, reading
from shared.networks.export import as_texts
from shared.networks.weights import run_file
from shared.run.files import atomic_file
from shared.run.flags import Parser, add_reading_flags

IMAGES = 32  # whose features are compared


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("weights", help="file of a ViT, or a release of this folder")
    parser.add_argument("out", help="file to write: .pth or .safetensors")
    parser.add_argument("--patch", type=int, required=True, help="side of the new patches in pixels")
    size = "side of the images in pixels, which gives the grid of positions; None: as many patches as before"
    parser.add_argument("--image_size", type=int, default=None, help=size)
    parser.add_argument("--data_path", default=None, help="images to compare features of; None: the embedded ones")
    add_reading_flags(parser.add_argument)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    args = parser.parse_args(arguments)
    if Path(args.out).suffix not in (".pth", ".safetensors"):
        parser.error(f"{args.out} ends neither in .pth nor in .safetensors")
    if Path(args.out).resolve() == run_file(args.weights).resolve():
        parser.error(f"{args.out} is the file that is read: name another one to write")
    if args.patch < 1 or (args.image_size or args.patch) < args.patch:
        parser.error(f"--patch {args.patch} is less than 1 or more than --image_size")
    return args


def with_patches_of(network: FlexiViT, patch_size: int, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The state dict of the same ViT for another size of patches and another grid of them."""
    tensors = dict(network.state_dict())
    tensors["patch_embed.proj.weight"] = pi_resize(network.patch_embed.proj.weight, (patch_size, patch_size))
    tensors["pos_embed"] = resize_positions(network.pos_embed, network.grid, grid)
    if network.pool == "tok":  # timm's class token has a position
        tensors["pos_embed"] = torch.cat([torch.zeros_like(network.cls_token), tensors["pos_embed"]], dim=1)
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def resize_patch(args: argparse.Namespace) -> float:
    """Write the file; the mean cosine of the images' features before and after, each image at as many patches."""
    network, normalisation = load_as_trained(args.weights, "weights")
    old, side = network.patch_size[0], args.image_size
    grid = network.grid if side is None else (side // args.patch,) * 2
    with atomic_file(Path(args.out)) as temporary:
        tensors, said = with_patches_of(network, args.patch, grid), described(network) | normalisation
        if args.out.endswith(".safetensors"):
            save_file(tensors, temporary, as_texts(said))
        else:
            torch.save({"model": tensors, "args": said}, temporary)
    print(f"patches of {old} pixels, {network.grid[0]}x{network.grid[1]} positions: {args.weights}")
    print(f"patches of {args.patch} pixels, {grid[0]}x{grid[1]} positions: {args.out}")

    how = reading(args)
    source = open_val(args.data_path, None, **how) or open_source(args.data_path, "all", **how)
    pixels = old * network.grid[0]
    transform = EvalTransform(pixels, pixels, **normalisation, in_chans=network.patch_embed.proj.in_channels)
    dataset = EvalDataset(source, transform, rows=range(min(IMAGES, len(source))))
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    resized = F.interpolate(images, scale_factor=args.patch / old, mode="bilinear", antialias=args.patch < old)
    before = network.represent(images)
    cosine = F.cosine_similarity(before, network.represent(resized, args.patch), dim=1)
    others = F.cosine_similarity(before, before.roll(1, dims=0), dim=1)
    print(
        f"features of {len(images)} images, resized as their patches are: mean cosine {cosine.mean():.4f}, "
        f"of different images {others.mean():.4f}"
    )
    return float(cosine.mean())


def main() -> None:
    with distributed.clean_exit():
        resize_patch(parse_args())


if __name__ == "__main__":
    main()
