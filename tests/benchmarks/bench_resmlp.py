"""Images per second of ResMLP beside timm's implementation of the same network, with the same weights.

    python tests/benchmarks/bench_resmlp.py [--out FILE.json]
    python tests/benchmarks/bench_resmlp.py --archs resmlp_12 resmlp_24 --dtypes float32 --no-compile

Both networks, alternated in one process; the median of the ratios of neighbouring rounds counts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import timm
import torch
from torch import nn

import shared.run.passive_threads  # noqa: F401
from resmlp.export import TIMM_MODELS
from resmlp.hub import to_timm
from resmlp.resmlp_models import ARCHITECTURES
from tests.benchmarks.beside_timm import add_flags, compare, table
from tests.benchmarks.harness import finish, get_args_parser


def build(arch: str, side: int, device: str) -> tuple[nn.Module, nn.Module]:
    """Our network and timm's with the same weights."""
    torch.manual_seed(0)
    ours = ARCHITECTURES[arch](img_size=side)
    theirs = timm.create_model(TIMM_MODELS[ours.embed_dim, ours.patch_size, len(ours.blocks)], img_size=side)
    theirs.load_state_dict(to_timm(ours.state_dict()))
    return ours.to(device), theirs.to(device)


def main() -> None:
    parser = get_args_parser(__doc__, rounds=7)
    add = parser.add_argument
    add("--archs", nargs="+", default=["resmlp_12"], choices=tuple(ARCHITECTURES))
    add("--side", type=int, default=224, help="of the square images in pixels")
    add_flags(parser, compiled=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for arch in args.archs:
        networks = build(arch, args.side, args.device)
        images = torch.randn(args.batch_size, 3, args.side, args.side, device=args.device)
        results += compare(arch, *networks, images, args.dtypes, args.compile, args.rounds)
    print(table(results), flush=True)
    worst = min(result["ratio"] for result in results)
    targets = {"not slower than timm": worst >= 1, "1.2 times as fast as timm": worst >= 1.2}
    finish(args, {"results": results}, targets, (torch, timm))


if __name__ == "__main__":
    main()
