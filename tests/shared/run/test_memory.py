import platform
import subprocess
import sys
from pathlib import Path

COUNT_FAULTS = """
import resource, torch
from shared.run.memory import keep_freed_memory

def forward_and_backward():
    kept = []
    for _ in range(6):
        temporary = torch.ones(2**21)
        kept += [torch.ones(6 * 2**20), torch.ones(2**21)]
        temporary = torch.ones(9 * 2**20)
        kept += [torch.ones(9 * 2**20)]
    while kept:
        kept.pop()

print(keep_freed_memory() if {keep} else None)
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    forward_and_backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(keep: bool) -> tuple[str, int, int]:
    """What the function returned, and the page faults of the first step and of the best one after it.

    Blocks do not find the gaps of their size in every step until the heap has grown far enough.
    """
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", COUNT_FAULTS.format(keep=keep)]
    answer, *faults = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    return answer, int(faults[0]), min(map(int, faults[1:]))


def test_the_memory_of_a_step_comes_back_without_page_faults():
    answer, first, later = run(keep=True)
    if platform.libc_ver()[0] == "glibc":
        assert answer == "True"
        assert later < first / 4
        _, _, default = run(keep=False)
        assert later < default / 4
    else:
        assert answer == "False"
