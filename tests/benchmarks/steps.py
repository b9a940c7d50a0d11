"""Training steps of a method at equal precision: as a textbook writes them and ours, in turns.

Each kind of step is in a process of its own, so that peak memory is told apart:

- ``plain``, ``ours``: in float32;
- ``plain-bf16``, ``ours-bf16``: the same under bfloat16 autocast, where the device has units for it;
- ``ours-bf16-compiled``, with --compile: with compiled networks;
- ``products``, ``products-bf16``: no step, but products of two large matrices.

Steps are compared with the plain one of the same precision, and their products per second (those of the plain step,
counted) with what the device reaches in ``products`` in the same run.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile

from shared.optimisation.precision import fast_bf16
from tests.benchmarks.harness import InProcess, Times, compare
from tests.loop_run import LoopRun

TARGETS = {"ours": 1.2, "ours-bf16": 1.5, "ours-bf16-compiled": 1.7}  # speed over plain of the same precision
MOST_MEMORY = 0.7  # of plain's
LEAST_SHARE = 0.45  # of the product rate, compiled
STEPS = 10_000  # of a run's schedules
WARM_UP = 2  # turns that do not count
# rows and columns of the matrices whose product says what the device can, and how often it is repeated
PRODUCTS = {"cpu": (2048, 1), "cuda": (8192, 20)}

# makes a step of a kind, which returns its loss: (kind, size, ...)
MakeStep = Callable[..., Callable[[], float]]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="also time ours compiled, which takes minutes first")
    parser.add_argument("--no_float32", action="store_true", help="bfloat16 only, where float32 has no room")
    parser.add_argument("--launches", action="store_true", help="count kernel launches and synchronisations of a step")


def kinds_of(size: argparse.Namespace) -> list[str]:
    """Kinds of steps to compare on a device with these flags."""
    if not fast_bf16(torch.device(size.device)):
        print("bfloat16: not timed, the device has no units for it", flush=True)
        return ["plain", "ours"]
    float32 = [] if size.no_float32 else ["plain", "ours"]
    return [*float32, "plain-bf16", "ours-bf16", *["ours-bf16-compiled"] * size.compile]


def products_of(kinds: list[str]) -> list[str]:
    return [kind.replace("plain", "products") for kind in kinds if kind.startswith("plain")]


def precision_of(kind: str) -> str:
    return "bf16" if "bf16" in kind else "fp32"


def make_work(make_step: MakeStep, kind: str, size: argparse.Namespace, *args) -> Callable[[], float]:
    """A step, which gives its loss, or ``products``, which give floating-point operations per second."""
    torch.set_num_threads(size.threads)
    if not kind.startswith("products"):
        return make_step(kind, size, *args)
    dtype = torch.bfloat16 if precision_of(kind) == "bf16" else torch.float32
    rows, times = PRODUCTS[size.device]
    a, b = torch.randn(2, rows, rows, device=size.device).to(dtype)

    def products() -> float:
        start = time.perf_counter()
        for _ in range(times):
            product = a @ b
        product[0, 0].item()  # the device has finished
        return 2 * rows**3 * times / (time.perf_counter() - start)

    return products


def make_turn(make_step: MakeStep, kind: str, size: argparse.Namespace, *args) -> Callable[[], tuple[float, float]]:
    """Work that gives its seconds, and what :func:`make_work` gives.

    On a GPU the memory that one kind leaves in its cache would be missing for the next: it is given back after a turn
    and filled again by a step that is not timed.
    """
    work = make_work(make_step, kind, size, *args)

    def turn() -> tuple[float, float]:
        if size.device == "cuda":
            work()
        start = time.perf_counter()
        found = work()
        seconds = time.perf_counter() - start
        if size.device == "cuda":
            torch.cuda.empty_cache()
        return seconds, found

    return turn


def make_launches(make_step: MakeStep, kind: str, size: argparse.Namespace, *args) -> Callable[[], dict[str, int]]:
    """A step under the profiler; it gives the kernels that were launched and the waits for the device."""
    step = make_work(make_step, kind, size, *args)

    def count() -> dict[str, int]:
        for _ in range(2):
            step()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step()
        names = {event.key: event.count for event in profiler.key_averages()}
        kinds = {"launches": ("LaunchKernel", "GraphLaunch"), "synchronisations": ("Synchronize",)}
        return {
            what: sum(n for name, n in names.items() if name.startswith("cu") and any(part in name for part in parts))
            for what, parts in kinds.items()
        }

    return count


class StepRun(LoopRun):
    """The run of one of our steps, done again and again, which remembers the last loss."""

    def __init__(self, amp: str, device: str):
        self.folder = tempfile.TemporaryDirectory()
        super().__init__(Path(self.folder.name), STEPS, amp=amp, device=device, max_skipped_steps=0)
        self.log = SimpleNamespace(
            batches=lambda loader: loader, is_due=lambda step: False, step=self._remember, total_steps=STEPS
        )

    def _remember(self, step: int, epoch: int, images: int, averages: dict) -> None:
        self.last_loss = averages["loss"].item()


@dataclass
class Turns:
    """What every kind took: seconds by round, the loss of every timed step (those of the warm-up too) or the product
    rate, and peaks in GiB.

    ``launches`` has the kernel launches and synchronisations of a step, with --launches.
    """

    times: Times
    losses: dict[str, list[float]]
    peaks: dict[str, float]
    launches: dict[str, dict[str, int]]


def take_turns(make_step: MakeStep, kinds: list[str], size: argparse.Namespace, rounds: int, *args) -> Turns:
    """``rounds`` steps of every kind, after ``WARM_UP`` that do not count.

    Args:
        size: Has the flags of :func:`add_flags`, and ``threads``.
        args: For ``make_step``, which is called with them in other processes.
    """
    work = {kind: InProcess(make_turn, make_step, kind, size, *args, device=size.device) for kind in kinds}
    times, losses, launches = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}, {}
    for turn in range(WARM_UP + rounds):
        for kind in kinds:
            seconds, loss = work[kind]()
            losses[kind].append(loss)
            if turn >= WARM_UP:
                times[kind].append(seconds)
    for step in work.values():
        step.stop()
    for kind in [kind for kind in kinds if size.launches and not kind.startswith("products")]:
        counter = InProcess(make_launches, make_step, kind, size, *args, device=size.device)
        launches[kind] = counter()
        counter.stop()
    return Turns(times, losses, {kind: step.peak_mib / 1024 for kind, step in work.items()}, launches)


def compare_steps(turns: Turns, operations: int, batch: int) -> dict:
    """Rows of :func:`compare` for the steps of each precision, with memory and the share of the product rate.

    Args:
        operations: Floating-point operations of the products of a plain step of ``batch`` images.
    """
    rows = {}
    for amp in ("fp32", "bf16"):
        of_amp = {kind: seconds for kind, seconds in turns.times.items() if precision_of(kind) == amp}
        if not of_amp:
            continue
        (product,), (plain,) = ([kind for kind in of_amp if kind.startswith(name)] for name in ("products", "plain"))
        of_amp.pop(product)
        rate = max(turns.losses[product])
        print(f"{product}: {rate / 1e9:.0f} GF/s at best; a step takes {operations / 1e9:.0f} GF")
        further = {
            kind: {
                "images_per_s": batch / min(seconds),
                "share_of_products": operations / min(seconds) / rate,
                "peak_gib": turns.peaks[kind],
                "memory_ratio": turns.peaks[kind] / turns.peaks[plain],
                **turns.launches.get(kind, {}),
            }
            for kind, seconds in of_amp.items()
        }
        note = "{images_per_s:.2f} images/s at best, {share_of_products:.0%} of the product rate; {peak_gib:.2f} GiB: "
        note += "{memory_ratio:.2f} of plain"
        notes = {
            kind: note.format(**numbers) + "".join(f", {n} {what}" for what, n in turns.launches.get(kind, {}).items())
            for kind, numbers in further.items()
        }
        rows |= {kind: row | further[kind] for kind, row in compare(of_amp, plain, notes).items()}
    return rows


def differences_of_losses(losses: dict[str, list[float]], tolerance: float = 1e-4) -> dict[str, float]:
    """Print, and return, how far the losses of every kind are from the plain ones, relatively, at most.

    Raises:
        AssertionError: If ours in float32 are farther than ``tolerance``.
    """
    plain = losses.get("plain", losses.get("plain-bf16"))
    worst = {kind: max(abs(a / b - 1) for a, b in zip(own, plain, strict=True)) for kind, own in losses.items()}
    print("largest relative difference from the plain losses:", ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))
    assert worst.get("ours", 0.0) < tolerance, losses
    return worst


def targets(rows: dict[str, dict]) -> dict[str, bool]:
    """Whether each bar on speed and memory is met."""
    found = {}
    for kind, least in TARGETS.items():
        if kind in rows:
            found[f"{kind} {least} times as fast as plain"] = rows[kind]["speedup"]["median"] >= least
            found[f"{kind} in {MOST_MEMORY} of the memory"] = rows[kind]["memory_ratio"] <= MOST_MEMORY
    for kind in [kind for kind in rows if kind.endswith("compiled")]:
        found[f"{kind} at {LEAST_SHARE:.0%} of the product rate"] = rows[kind]["share_of_products"] >= LEAST_SHARE
    return found
