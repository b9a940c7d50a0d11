"""Images per second of ResMLP beside timm's implementation of the same network, with the same weights.

    python tests/benchmarks/bench_resmlp.py [--out FILE.json]
    python tests/benchmarks/bench_resmlp.py --archs resmlp_12 resmlp_24 --dtypes float32 --no-compile

Both networks take turns in one process; the median of the ratios of neighbouring turns counts.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import timm
import torch
from torch import Tensor, nn

from resmlp.export import TIMM_MODELS
from resmlp.pretrained import to_timm
from resmlp.resmlp_models import ARCHITECTURES

WORK = ("forward", "training step")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--archs", nargs="+", default=["resmlp_12"], choices=tuple(ARCHITECTURES))
    add("--side", type=int, default=224, help="of the square images in pixels")
    add("--batch_size", type=int, default=8)
    add("--rounds", type=int, default=7, help="turns of each network")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="also compare both networks compiled")
    add("--out", type=Path, default=None, help="JSON file with every number")
    return parser


def build(arch: str, side: int, device: str) -> dict[str, nn.Module]:
    """Our network and timm's with the same weights."""
    torch.manual_seed(0)
    ours = ARCHITECTURES[arch](img_size=side)
    theirs = timm.create_model(TIMM_MODELS[arch], img_size=side)
    theirs.load_state_dict(to_timm(ours.state_dict()))
    return {"ours": ours.to(device), "timm": theirs.to(device)}


def do(work: str, network: nn.Module, images: Tensor, dtype: str) -> None:
    network.train(work != "forward")
    with torch.set_grad_enabled(network.training):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            out = network(images)
        if network.training:
            out.float().square().mean().backward()
            network.zero_grad(set_to_none=True)
    if images.is_cuda:
        torch.cuda.synchronize()


def compare(networks: dict[str, nn.Module], work: str, images: Tensor, dtype: str, rounds: int) -> dict:
    """Images per second of both, and how much faster ours is."""
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(rounds + 1):
        for name, network in networks.items():
            start = time.perf_counter()
            do(work, network, images, dtype)
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["timm"], strict=True)]
    rates = {f"{name}_images_per_s": len(images) / statistics.median(values) for name, values in seconds.items()}
    return {**rates, "ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}


def main(arguments: list[str] | None = None) -> dict:
    args = get_args_parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    results = []
    print("network     work           numbers             ours      timm (images/s)  ratio (range)")
    for arch in args.archs:
        networks = build(arch, args.side, args.device)
        images = torch.randn(args.batch_size, 3, args.side, args.side, device=args.device)
        with torch.no_grad():
            outputs = [network.eval()(images) for network in networks.values()]
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
        for compiled in (False, True) if args.compile else (False,):
            if compiled:
                networks = {name: torch.compile(network) for name, network in networks.items()}
            for dtype in args.dtypes:
                for work in WORK:
                    result = compare(networks, work, images, dtype, args.rounds)
                    numbers = dtype + (", compiled" if compiled else "")
                    low, high = result["ratio_range"]
                    rates = f"{result['ours_images_per_s']:8.2f}  {result['timm_images_per_s']:8.2f}"
                    ratio = f"{result['ratio']:.2f} ({low:.2f} .. {high:.2f})"
                    print(f"{arch:10}  {work:13}  {numbers:18} {rates}            {ratio}", flush=True)
                    results.append({"network": arch, "work": work, "dtype": dtype, "compiled": compiled, **result})
    worst = min(result["ratio"] for result in results)
    report = {
        "machine": {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
        "flags": {name: str(value) for name, value in vars(args).items()},
        "results": results,
        "targets": {"not slower than timm": worst >= 1, "1.2 times as fast as timm": worst >= 1.2},
    }
    for target, met in report["targets"].items():
        print(f"target: {target}: {'met' if met else 'not met'}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
