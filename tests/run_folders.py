"""What tests do with a run: stop it, read its log and its newest checkpoint."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.run.checkpoint import load_latest
from shared.run.log import read_log
from shared.run.run import Run

CHECKPOINTS = ("checkpoint.pth", "checkpoint.pth.tar", "msn-latest.pth.tar", "paws-latest.pth.tar")


class Stop(Exception):
    pass


@contextlib.contextmanager
def stopped_after(updates: int) -> Iterator[None]:
    """In here a training ends like a killed one when it wants to make another update than so many."""
    update, calls = Run.update, []

    def stop(*args) -> None:
        calls.append(args)
        if len(calls) > updates:
            raise Stop
        update(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Run, "update", stop)
        yield


def lines(output_dir, log: str = "metrics") -> list[dict]:
    return read_log(Path(output_dir) / f"{log}.jsonl")


def losses(output_dir) -> list[float]:
    return [line["loss"] for line in lines(output_dir) if "loss" in line]


def state_of(output_dir, *names: str) -> dict:
    """The checkpoint of this name, or of that which a training gives it."""
    paths = [Path(output_dir) / name for name in names or CHECKPOINTS]
    return load_latest(next(path for path in paths if path.exists()))
