import platform
import resource

import torch

from shared.run.memory import keep_freed_memory
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
