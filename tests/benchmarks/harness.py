"""What every benchmark does alike: its flags, implementations alternated in one run, ratios with their range, JSON."""

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

Times = dict[str, list[float]]  # seconds of every implementation, round by round


def get_args_parser(docstring: str, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=docstring.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each implementation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="JSON file with every number")
    return parser


def clustered_features(num_samples: int, dim: int, seed: int) -> Tensor:
    """Rows around 1,000 centres, with variances that fall over the dimensions as those of real features do."""
    centres = torch.randn(1000, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(1000, (num_samples,), generator=generator)
    features = centres[labels] + torch.randn(num_samples, dim, generator=generator)
    return features * torch.arange(1, dim + 1) ** -0.25


def alternate(ways: dict[str, Callable], rounds: int, warm_up: int = 1, before: Callable = lambda: None) -> Times:
    """Seconds of every implementation in turns, after ``warm_up`` rounds that do not count.

    Args:
        before: Called before each turn, outside of its time.
    """
    times: Times = {name: [] for name in ways}
    for turn in range(warm_up + rounds):
        for name, way in ways.items():
            before()
            start = time.perf_counter()
            way()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def as_text(values: dict[str, float]) -> str:
    return "{median:.2f} ({min:.2f} .. {max:.2f})".format(**values)


def growth(name: str, sizes: list[int], step: Callable[[int], object], rounds: int) -> dict:
    """Median seconds of ``step(size)`` for each size, and the exponent between the smallest and the largest."""
    ways = {size: lambda size=size: step(size) for size in sizes}
    times = {size: statistics.median(seconds) for size, seconds in alternate(ways, rounds).items()}
    exponent = math.log(times[sizes[-1]] / times[sizes[0]]) / math.log(sizes[-1] / sizes[0])
    points = ", ".join(f"{size}: {seconds:.2f} s" for size, seconds in times.items())
    print(f"growth of {name}: exponent {exponent:.2f} ({points})", flush=True)
    return {"seconds": times, "exponent": exponent}


def compare(times: Times, base: str, notes: dict[str, str] | None = None) -> dict[str, dict]:
    """Print, and return, for every implementation its ratios to ``base``, each of two turns of the same round.

    Args:
        notes: Printed at the end of the implementations' lines.
    """
    rows, width = {}, max(map(len, times))
    print(f"{'':{width}} {'seconds':>9}  {f'time over {base}':22}  {'times as fast':22}  of the best turns")
    for name, seconds in times.items():
        over = spread(a / b for a, b in zip(seconds, times[base], strict=True))
        speedup = spread(b / a for a, b in zip(seconds, times[base], strict=True))
        of_best = min(times[base]) / min(seconds)
        rows[name] = {"seconds": seconds, f"over_{base}": over, "speedup": speedup | {"of_best": of_best}}
        line = f"{name:{width}} {statistics.median(seconds):9.4f}  {as_text(over):22}  {as_text(speedup):22}"
        print(f"{line}  {of_best:.2f}  {(notes or {}).get(name, '')}".rstrip(), flush=True)
    return rows


def peak_mib(device: str = "cpu") -> float:
    """Most memory so far: of the device, or of this process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def allocated_bytes(work: Callable) -> int:
    """Most bytes that the work has allocated on a CPU at a time, as torch's profiler sees them."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


class InProcess:
    """Work in a process of its own, so that its peak memory is told apart.

    Args:
        make: Function of a module; called there with ``args``, it returns the work.
        device: Whose memory counts.

    Attributes:
        idle_mib: Before the work was made: what the imported libraries take.
        peak_mib: After the last call.
    """

    def __init__(self, make: Callable, *args, device: str = "cpu"):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, args, device), daemon=True)
        self.process.start()

    def __call__(self):
        """What the work returns."""
        self.connection.send(True)
        result, self.idle_mib, self.peak_mib = self.connection.recv()
        return result

    def stop(self) -> None:
        self.connection.send(False)
        self.process.join()


def _serve(connection, make: Callable, args: tuple, device: str) -> None:
    idle_mib, work = peak_mib(device), make(*args)
    while connection.recv():
        connection.send((work(), idle_mib, peak_mib(device)))


def finish(args: argparse.Namespace, result: dict, targets: dict[str, bool] | None = None, packages=(torch,)) -> dict:
    """Print targets, memory and versions, write ``--out``, and return all that it holds."""
    report = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {package.__name__: package.__version__ for package in packages},
        "flags": {name: str(value) for name, value in vars(args).items()},
        **result,
        "targets": targets or {},
        "peak_mib": peak_mib(),
    }
    for target, met in report["targets"].items():
        print(f"target: {target}: {'met' if met else 'not met'}")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    print(f"peak memory {report['peak_mib']:.0f} MiB; {versions}; {report['capability']}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return report
