"""What tests do with a run: stop it, read its log and its newest checkpoint."""

from contextlib import AbstractContextManager
from pathlib import Path

from shared.run.checkpoint import load_latest
from shared.run.log import read_log
from shared.run.run import Run
from tests.interruption import interrupted

CHECKPOINTS = ("checkpoint.pth", "checkpoint.pth.tar", "msn-latest.pth.tar", "paws-latest.pth.tar")


def stopped_after(updates: int) -> AbstractContextManager:
    """In here a training ends like a killed one when it wants to make another update than so many."""
    return interrupted(Run, "update", updates + 1)


def lines(output_dir, log: str = "metrics") -> list[dict]:
    return read_log(Path(output_dir) / f"{log}.jsonl")


def losses(output_dir) -> list[float]:
    return [line["loss"] for line in lines(output_dir) if "loss" in line]


def state_of(output_dir, *names: str) -> dict:
    """The checkpoint of this name, or of that which a training gives it."""
    paths = [Path(output_dir) / name for name in names or CHECKPOINTS]
    return load_latest(next(path for path in paths if path.exists()))
