"""XCiT's claim, cost against resolution beside a ViT of equal size, and its speed beside timm's same network.

    python tests/benchmarks/bench_xcit.py [--out FILE.json] [--picture FILE.png]
    python tests/benchmarks/bench_xcit.py --sides 96 224 384 512 768 1024 --patch_sizes 8 16 --threads 2

The ViT is timm's, with as many channels and blocks and with PyTorch's fused attention, which needs no attention matrix
in memory: a fair opponent. For every resolution both networks do a forward pass and a training step, on a CPU each in a
process of its own, so that peak memory (beyond that of the idle network) is told apart. The second table compares our
network with timm's XCiT of the same weights, alternated; the median of the ratios counts.
"""

import argparse
import math
import multiprocessing
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import timm
import torch
from torch import nn

import shared.run.passive_threads  # noqa: F401
from shared.pictures.curves import Curve, Panel, save_panels
from tests.benchmarks import beside_timm, harness
from tests.benchmarks.beside_timm import WORK, do
from tests.benchmarks.harness import finish, peak_mib
from xcit.cross_covariance_transformer import architecture, build_xcit
from xcit.hub import to_timm


def get_args_parser() -> argparse.ArgumentParser:
    parser = harness.get_args_parser(__doc__, rounds=3)  # of which the fastest counts
    add = parser.add_argument
    add("--size", default="small_12", help="of the XCiT; the ViT has as many channels, blocks and heads")
    add("--sides", type=int, nargs="+", default=[96, 160, 224, 320, 448, 640], help="of the square images in pixels")
    add("--patch_sizes", type=int, nargs="+", default=[16], choices=(8, 16))
    add("--batch_size", type=int, default=1)
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--scaling_dtype", default="float32", choices=("float32", "bfloat16"), help="of the work at every resolution")
    add("--timm_side", type=int, default=224, help="side of the images in the comparison with timm; 0: none")
    add("--timm_batch_size", type=int, default=8)
    add("--timm_rounds", type=int, default=9, help="turns of each network in the comparison with timm")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"), help="beside timm")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="also compare with timm compiled")
    add("--picture", type=Path, default=None, help="PNG file with the curves")
    return parser


def build(kind: str, size: str, patch_size: int, side: int) -> nn.Module:
    """``xcit`` or ``vit``: the latter with the channels, blocks and heads of the former."""
    name = f"xcit_{size}_p{patch_size}"
    if kind == "xcit":
        return build_xcit(name)
    options = architecture(name)
    # heads of 64 channels, for which fused attention is made
    heads = max(1, options["embed_dim"] // 64)
    return timm.models.VisionTransformer(
        img_size=math.ceil(side / patch_size) * patch_size,
        patch_size=patch_size,
        embed_dim=options["embed_dim"],
        depth=options["depth"],
        num_heads=heads,
        dynamic_img_pad=True,
    )


def measure(kind: str, work: str, patch_size: int, side: int, args: argparse.Namespace) -> dict:
    """Seconds of the fastest of several rounds, and MiB at the peak beyond the idle network."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    network = build(kind, args.size, patch_size, side).to(args.device)
    images = torch.randn(args.batch_size, 3, side, side, device=args.device)
    idle = peak_mib(args.device)
    seconds = []
    for _ in range(args.rounds + 1):  # the first one warms up
        start = time.perf_counter()
        do(work, network, images, args.scaling_dtype)
        seconds.append(time.perf_counter() - start)
    return {
        "network": kind,
        "work": work,
        "patch_size": patch_size,
        "side": side,
        "seconds": min(seconds[1:]),
        "peak_mib": peak_mib(args.device) - idle,
        "parameters": sum(p.numel() for p in network.parameters()),
    }


def in_a_process(*arguments) -> dict:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "matplotlib.figure", "shared.pictures.sheets"])
    with context.Pool(1) as pool:
        return pool.apply(measure, arguments)


def crossing(sides: list[int], xcit: list[float], vit: list[float]) -> float | None:
    """The side in pixels from which XCiT stays the cheaper one; None if the ViT is cheaper at the largest side.

    Between two sides the costs are taken as straight lines on logarithmic axes.
    """
    gaps = [math.log(max(x, 1e-9) / max(v, 1e-9)) for x, v in zip(xcit, vit, strict=True)]
    if gaps[-1] > 0:
        return None
    dearer = [i for i, gap in enumerate(gaps) if gap > 0]
    if not dearer:
        return float(sides[0])
    i = dearer[-1]
    share = gaps[i] / (gaps[i] - gaps[i + 1])
    return math.exp(math.log(sides[i]) + share * (math.log(sides[i + 1]) - math.log(sides[i])))


def table(results: list[dict], sides: list[int]) -> str:
    """Markdown, one row per kind of work, patch size and side."""
    rows = ["| work | patch | side (px) | XCiT | ViT | ratio | XCiT peak | ViT peak | ratio |", "|---" * 9 + "|"]
    notes = []
    for work, patch_size in dict.fromkeys((r["work"], r["patch_size"]) for r in results):
        columns = {}
        for kind in ("xcit", "vit"):
            mine = [r for r in results if (r["network"], r["work"], r["patch_size"]) == (kind, work, patch_size)]
            columns[kind] = [[r[key] for r in mine] for key in ("seconds", "peak_mib")]
        for i, side in enumerate(sides):
            (xs, xm), (vs, vm) = ([c[i] for c in columns[kind]] for kind in ("xcit", "vit"))
            rows.append(
                f"| {work} | {patch_size} | {side} | {1000 * xs:.0f} ms | {1000 * vs:.0f} ms | {xs / vs:.2f} "
                f"| {xm:.0f} MiB | {vm:.0f} MiB | {xm / max(vm, 1e-9):.2f} |"
            )
        for what, (x, v) in zip(("time", "memory"), zip(*columns.values(), strict=True), strict=True):
            point = crossing(sides, x, v)
            where = "nowhere up to the largest side" if point is None else f"from {point:.0f} px on"
            notes.append(f"{work}, patches of {patch_size}: XCiT needs less {what} {where}.")
    return "\n".join([*rows, "", *notes])


def picture(results: list[dict], path: Path) -> None:
    panels = []
    for work in WORK:
        for key, unit in (("seconds", "seconds"), ("peak_mib", "MiB beyond the idle network")):
            curves = []
            for kind, patch_size in dict.fromkeys((r["network"], r["patch_size"]) for r in results):
                mine = [r for r in results if (r["network"], r["patch_size"], r["work"]) == (kind, patch_size, work)]
                label = f"{'XCiT' if kind == 'xcit' else 'ViT'}/{patch_size}"
                curves.append(Curve([r["side"] for r in mine], [r[key] for r in mine], label))
            what = "time" if key == "seconds" else "peak memory"
            panels.append(Panel(f"{work}: {what}", "side of the image (px)", unit, curves))
    save_panels(panels, path, "XCiT and a ViT of equal size with fused attention")


def compare_with_timm(args: argparse.Namespace) -> list[dict]:
    """Images per second of both implementations of XCiT, with the same weights, for every patch size."""
    torch.set_num_threads(args.threads)
    results = []
    images = torch.randn(args.timm_batch_size, 3, args.timm_side, args.timm_side, device=args.device)
    for patch_size in args.patch_sizes:
        name = f"xcit_{args.size}_p{patch_size}"
        ours, theirs = build_xcit(name), timm.create_model(f"{name}_224", pretrained=False)
        theirs.load_state_dict(to_timm(ours.state_dict()))
        ours, theirs = ours.to(args.device), theirs.to(args.device)
        results += beside_timm.compare(name, ours, theirs, images, args.dtypes, args.compile, args.timm_rounds)
    return results


def main(arguments: list[str] | None = None) -> dict:
    args = get_args_parser().parse_args(arguments)
    measure_alone = in_a_process if args.device == "cpu" else measure  # a GPU's peaks can be reset
    scaling = [
        measure_alone(kind, work, patch_size, side, args)
        for patch_size in args.patch_sizes
        for work in WORK
        for side in args.sides
        for kind in ("xcit", "vit")
    ]
    print(table(scaling, args.sides), flush=True)
    against_timm = compare_with_timm(args) if args.timm_side else []
    if against_timm:
        print("\n" + beside_timm.table(against_timm), flush=True)
    if args.picture is not None:
        picture(scaling, args.picture)
    return finish(args, {"scaling": scaling, "beside_timm": against_timm}, packages=(torch, timm))


if __name__ == "__main__":
    main()
