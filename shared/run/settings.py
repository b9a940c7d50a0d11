"""Settings that make no sense for so few images or steps: what to take instead; ``--small_data`` takes it."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared import distributed


@dataclass(frozen=True)
class Advice:
    """What is wrong with a flag, and the value to take."""

    flag: str
    reason: str
    take: float | list

    def __str__(self) -> str:
        return f"{self.reason}: take {self.flag} {flag_text(self.take)}"


def flag_text(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def tell_settings(args: argparse.Namespace, *advice: Advice | None) -> None:
    """Print what there is to say; with ``--small_data`` take the advice, but for flags that were set, and say so.

    To be called before networks and schedules are built.
    """
    unset = getattr(args, "unset", {})  # with --small_data: official values by name
    for item in filter(None, advice):
        name = item.flag.removeprefix("--")
        if name in unset:
            setattr(args, name, item.take)
        else:
            hint = ", or take --small_data" if getattr(args, "small_data", True) is False else ""
            distributed.print_once(f"NOTE: {item}{hint}")
    for name, official in unset.items() if unset and args.data_path else ():
        if getattr(args, name) != official:
            distributed.print_once(f"--small_data: --{name} {flag_text(official)} -> {flag_text(getattr(args, name))}")


def long_warmup(flag: str, warmup: float, total: int, unit: str = "epochs", what: str = "warm-up") -> Advice | None:
    """A warm-up, or a cooldown, of more than a third of the run; a tenth is usual."""
    share = f"for {warmup / total:.0%} of the {total} {unit}" if warmup <= total else f"longer than all {total} {unit}"
    reason = f"{flag} {warmup:g} is a {what} {share}"
    return Advice(flag, reason, max(round(total / 10), int(total >= 3))) if warmup > total / 3 else None


def long_freeze(flag: str, frozen: int, total_steps: int) -> Advice | None:
    """Layers that do not learn for more than a tenth of the run."""
    reason = f"{flag} {frozen} is more than a tenth of the {total_steps} steps"
    return Advice(flag, reason, total_steps // 10) if frozen > total_steps / 10 else None


def slow_average(flag: str, momenta: np.ndarray, what: str = "teacher", last: float | None = None) -> Advice | None:
    """Momenta of all steps with which an average of the weights keeps more than half of those it starts with.

    Args:
        last: Second value of the flag, if it has one.
    """
    kept, steps = float(np.prod(momenta)), len(momenta)
    take = float(f"{max(0.5, 1 - 9 / steps):.3g}")  # on a cosine to 1 it keeps a hundredth
    reason = f"{flag} {momenta[0]:g}: after {steps} steps the {what} still keeps {kept:.0%} of its initial weights"
    return Advice(flag, reason, take if last is None else [take, last]) if kept > 0.5 else None


def more_than_data(
    flag: str, numbers: int | Sequence[int], num_images: int, take: int | None = None, what: str = "images"
) -> Advice | None:
    """More outputs, clusters, rows of a queue or of a batch than images; by default one for ten images is advised."""
    take = max(2, num_images // 10) if take is None else take
    most = max(numbers) if isinstance(numbers, list) else numbers
    reason = f"{flag} {flag_text(numbers)} is more than the {num_images} {what}"
    advised = [take] * len(numbers) if isinstance(numbers, list) else take
    return Advice(flag, reason, advised) if most > num_images else None
