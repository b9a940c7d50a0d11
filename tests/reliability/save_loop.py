"""A training in miniature for a judge from outside: numbers that depend on all steps before, saved at each of them.

    python save_loop.py FOLDER [--protocol overwrite|unsynced]

The protocols other than ours are mistakes that the judge must find.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from shared.run import checkpoint

STEPS = 3


def save_over(path: Path, state: dict, keep_as: str | None) -> None:
    torch.save(state, path)


def save_without_fsync(path: Path, state: dict, keep_as: str | None) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
    os.replace(temporary, path)


PROTOCOLS = {"ours": checkpoint.save, "overwrite": save_over, "unsynced": save_without_fsync}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--protocol", default="ours", choices=PROTOCOLS)
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    path = args.folder / "checkpoint.pth"
    checkpoint.remove_leftovers(path)
    state = checkpoint.load_latest(path) or {"step": 0, "numbers": torch.linspace(0, 1, 1000)}
    print(f"resumed from step {state['step']}")
    for step in range(state["step"], STEPS):
        state = {"step": step + 1, "numbers": torch.sin(state["numbers"] + step)}
        PROTOCOLS[args.protocol](path, state, f"checkpoint{step:04d}.pth" if step % 2 == 0 else None)


if __name__ == "__main__":
    main()
