import platform
import resource
from argparse import Namespace

import numpy as np
import pytest
import torch

from shared.run.memory import keep_freed_memory, name_batch_flags, peak_memory
from tests.processes import run_processes


def forward_and_backward() -> None:
    kept = []
    for _ in range(3):
        temporary = [torch.ones(2**21)]
        kept += [torch.ones(6 * 2**20), torch.ones(2**21)]
        temporary[0] = torch.ones(9 * 2**20)
        kept += [torch.ones(9 * 2**20)]
    while kept:
        kept.pop()


def page_faults(rank: int, keep: bool) -> list[int]:
    """What the function returned, and the page faults of each step."""
    counts = [keep_freed_memory() if keep else False]
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        forward_and_backward()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return counts


def test_the_memory_of_a_step_comes_back_without_page_faults():
    """Blocks do not find the gaps of their size in every step until the heap has grown far enough: the best counts."""
    [[answer, first, *later]] = run_processes(page_faults, 1, True)
    assert answer == (platform.libc_ver()[0] == "glibc")
    if answer:
        [[_, *default]] = run_processes(page_faults, 1, False)
        assert min(later) < first / 4 and min(later) < min(default) / 4


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**60, dtype=torch.uint8),
        lambda: np.empty(2**60, np.uint8),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")),
    ],
    ids=["torch", "numpy", "GPU"],
)
def test_too_little_memory_names_the_flags_of_the_batch(allocate):
    args = Namespace(batch_size_per_gpu=64, batch_norm=True, epochs=3)
    with pytest.raises(ValueError, match=r"^out of memory: lower --batch_size_per_gpu \(.*allocate.*\)$"):
        try:
            allocate()
        except (MemoryError, RuntimeError) as error:
            name_batch_flags(error, args)
    args.accumulate = 1
    with pytest.raises(ValueError, match=r"lower --batch_size_per_gpu or raise --accumulate, which is 1 \("):
        name_batch_flags(MemoryError("too little"), args)
    name_batch_flags(ValueError("another one"), args)
    name_batch_flags(None, args)


def measure_peaks(rank: int) -> tuple[int, int, int, int, int]:
    before, there = peak_memory()
    held = bytearray(b"1") * (before + 50_000_000)
    after, size = peak_memory()[0], len(held)
    del held
    return before, after, peak_memory()[0], size, there


def test_peak_memory_grows_by_what_is_held_and_stays():
    ((before, after, freed, size, there),) = run_processes(measure_peaks, 1)
    assert after - before > 50_000_000 and size < after <= freed < there
