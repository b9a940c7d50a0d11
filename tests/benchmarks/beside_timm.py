"""Our network beside timm's implementation of it, eager and compiled: images per second of both, taking turns."""

import argparse
import statistics
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from tests.benchmarks.harness import alternate, spread

WORK = ("forward", "training step")


def add_flags(parser: argparse.ArgumentParser, *, bf16: bool = True, compiled: bool = False) -> None:
    """Flags of every comparison; whether it also takes bfloat16 and compiled networks where nothing is said."""
    add, dtypes = parser.add_argument, ("float32", "bfloat16")
    add("--batch_size", type=int, default=8)
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--dtypes", nargs="+", default=dtypes[: 1 + bf16], choices=dtypes)
    add("--compile", action=argparse.BooleanOptionalAction, default=compiled, help="also compare both compiled")


def do(work: str, network: nn.Module, images: Tensor, dtype: str) -> None:
    """One piece of work, finished when this returns; ``dtype`` is ``float32`` or ``bfloat16``."""
    network.train(work != "forward")
    with torch.set_grad_enabled(network.training):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            out = network(images)
        if network.training:
            out.float().square().mean().backward()
            network.zero_grad(set_to_none=True)
    if images.is_cuda:
        torch.cuda.synchronize()


def take_turns(networks: dict[str, nn.Module], work: str, images: Tensor, dtype: str, rounds: int) -> dict:
    """Images per second of ``ours`` and ``timm``, and how much faster ours is: median and range over the turns."""
    ways = {name: partial(do, work, network, images, dtype) for name, network in networks.items()}
    times = alternate(ways, rounds)
    rates = {f"{name}_images_per_s": len(images) / statistics.median(seconds) for name, seconds in times.items()}
    ratio = spread(theirs / ours for ours, theirs in zip(times["ours"], times["timm"], strict=True))
    return {**rates, "ratio": ratio["median"], "ratio_range": [ratio["min"], ratio["max"]]}


def compare(
    name: str, ours: nn.Module, theirs: nn.Module, images: Tensor, dtypes: Iterable[str], compiled: bool, rounds: int
) -> list[dict]:
    """A result per kind of work and type of numbers, of the networks as they are and, with ``compiled``, compiled.

    Raises:
        AssertionError: If the networks map the images to different logits: their weights are to be the same.
    """
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-3, atol=1e-4)
    eager = {"ours": ours, "timm": theirs}
    pairs = {False: eager}
    if compiled:
        pairs[True] = {key: torch.compile(network) for key, network in eager.items()}
    return [
        {
            "network": name,
            "work": work,
            "dtype": dtype,
            "compiled": is_compiled,
            **take_turns(networks, work, images, dtype, rounds),
        }
        for is_compiled, networks in pairs.items()
        for dtype in dtypes
        for work in WORK
    ]


def table(results: list[dict]) -> str:
    rows = ["| network | work | numbers | ours (images/s) | timm | ratio (range) |", "|---" * 6 + "|"]
    for r in results:
        numbers = r["dtype"] + (", compiled" if r["compiled"] else "")
        low, high = r["ratio_range"]
        rows.append(
            f"| {r['network']} | {r['work']} | {numbers} | {r['ours_images_per_s']:.2f} | {r['timm_images_per_s']:.2f} "
            f"| {r['ratio']:.2f} ({low:.2f} .. {high:.2f}) |"
        )
    return "\n".join(rows)
