"""The fused block of ViT-22B beside timm's ParallelScalingBlock with the same weights.

    python tests/benchmarks/bench_vit22b.py [--out FILE.json]

Both, alternated in one process, after their outputs were found equal; the median of the ratios of neighbouring rounds
counts. timm's block adds its output products by default, and has one product with ``fuse_out_proj``.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import timm
import torch
from timm.layers import RmsNorm
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

import shared.run.passive_threads  # noqa: F401
from tests.benchmarks.beside_timm import add_flags, compare, table
from tests.benchmarks.harness import finish, get_args_parser
from tests.vit22b.tiny import timm_state
from vit22b.scaled_vit import Block, Switches

SIZES = {"s": (384, 6), "b": (768, 12)}  # width, heads


def build(size: str, fuse_out: bool, device: str) -> tuple[nn.Module, nn.Module]:
    """Our block and timm's with the same weights."""
    torch.manual_seed(0)
    width, heads = SIZES[size]
    ours = Block(width, heads, 4 * width, Switches())
    for name, parameter in ours.named_parameters():
        nn.init.ones_(parameter) if name.endswith("scale") else nn.init.normal_(parameter, std=0.02)
    options = {"norm_layer": partial(RmsNorm, eps=1e-6), "act_layer": partial(nn.GELU, approximate="tanh")}
    theirs = ParallelScalingBlock(width, heads, 4.0, qk_norm=True, fuse_out_proj=fuse_out, **options)
    theirs.load_state_dict(timm_state(ours, fuse_out))
    return ours.to(device), theirs.to(device)


def main() -> None:
    parser = get_args_parser(__doc__, rounds=11)
    add = parser.add_argument
    add("--sizes", nargs="+", default=["s", "b"], choices=tuple(SIZES))
    add("--tokens", type=int, default=256)
    add_flags(parser, bf16=False)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for size in args.sizes:
        tokens = torch.randn(args.batch_size, args.tokens, SIZES[size][0], device=args.device)
        for fuse_out in (False, True):
            name = f"{size}, timm's output {'fused' if fuse_out else 'added'}"
            blocks = build(size, fuse_out, args.device)
            results += compare(name, *blocks, tokens, args.dtypes, args.compile, args.rounds)
    print(table(results), flush=True)
    targets = {"not behind timm": min(result["ratio"] for result in results) >= 1}
    finish(args, {"results": results}, targets, (torch, timm))


if __name__ == "__main__":
    main()
