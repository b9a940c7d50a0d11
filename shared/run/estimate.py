"""How large the folder of a run becomes, how long something takes, and how people say that."""

import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from shared import distributed

from .checkpoint import tensors_in

T = TypeVar("T")
FIRST_S, NEXT_S = 10, 60  # until the first line about the time left, and between two


def progress(batches: Iterable[T], what: str, num_batches: int, images: int) -> Iterator[T]:
    """Iterate: with a bar on a terminal, elsewhere with a line about the time left if it takes long; rank 0 says it.

    Args:
        what: Is done with ``images`` images.
    """
    is_main, start = distributed.is_main_process(), time.perf_counter()
    due = FIRST_S if is_main and not sys.stderr.isatty() else float("inf")
    bar = tqdm(batches, what, num_batches, leave=False, unit="batch", disable=not (is_main and sys.stderr.isatty()))
    for done, batch in enumerate(bar):
        passed = time.perf_counter() - start
        if done and passed > due:
            left = duration_text(passed / done * (num_batches - done))
            print(f"{what}: {done / num_batches:.0%} of {images:,} images, about {left} left", flush=True)
            due = passed + NEXT_S
        yield batch


def final_bytes(parts: dict, args: Namespace, steps_per_epoch: int, total_steps: int) -> int:
    """Bytes of all checkpoints of a finished run: the newest, the one before it, the best and the numbered ones.

    Every process must call this, after a step: optimisers have no state before.
    """
    one = sum(tensor.nbytes for _, tensor in tensors_in({name: part.state_dict() for name, part in parts.items()}))
    flags, epochs = vars(args), -(-total_steps // steps_per_epoch)
    lengths = {"checkpoint_freq": epochs, "save_freq": total_steps, "checkpoints": total_steps}
    lengths["saveckp_freq"] = epochs + flags.get("saveckp_freq", 0) - 1  # counts from the first epoch on
    return one * (2 + ("best" in parts) + sum(n // flags[name] for name, n in lengths.items() if flags.get(name)))


def duration_text(seconds: float) -> str:
    for unit, length, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def size_text(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
