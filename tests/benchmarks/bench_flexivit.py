"""A FlexiViT called with patches of 16 beside timm's ViT of patches of 16 with the same weights.

    python tests/benchmarks/bench_flexivit.py [--out FILE.json]

Both, alternated in one process, after their outputs were found equal; the median of the ratios of neighbouring rounds
counts. Ours holds kernels of 32 x 32 and positions of a grid of 7 x 7, and resizes both at every call.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import shared.run.passive_threads  # noqa: F401
from flexivit.flexible_vit import AtPatchSize
from flexivit.hub import build
from flexivit.resize_patch import with_patches_of
from tests.benchmarks.beside_timm import add_flags, compare, table
from tests.benchmarks.harness import finish, get_args_parser

PATCH_SIZE = 16


def build_pair(arch: str, side: int, device: str) -> tuple[nn.Module, nn.Module]:
    """Our network at patches of ``PATCH_SIZE`` and timm's with its weights."""
    torch.manual_seed(0)
    ours, grid = build(arch), side // PATCH_SIZE
    theirs = VisionTransformer(
        img_size=side,
        patch_size=PATCH_SIZE,
        embed_dim=ours.width,
        depth=len(ours.blocks),
        num_heads=ours.blocks[0].attn.num_heads,
        num_classes=0,
        act_layer=partial(nn.GELU, approximate="tanh"),
    )
    theirs.load_state_dict(with_patches_of(ours, PATCH_SIZE, (grid, grid)))
    return AtPatchSize(ours, PATCH_SIZE).to(device), theirs.to(device)


def main() -> None:
    parser = get_args_parser(__doc__, rounds=11)
    add = parser.add_argument
    add("--archs", nargs="+", default=["flexivit_s"])
    add("--image_size", type=int, default=224)
    add_flags(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    results = []
    for arch in args.archs:
        networks = build_pair(arch, args.image_size, args.device)
        results += compare(arch, *networks, images, args.dtypes, args.compile, args.rounds)
    print(table(results), flush=True)
    targets = {"within 5 % of timm": min(result["ratio"] for result in results) >= 0.95}
    finish(args, {"results": results}, targets, (torch, timm))


if __name__ == "__main__":
    main()
