"""What tests do with a run: stop it, read its log and its newest checkpoint."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.run.checkpoint import load_latest
from shared.run.run import Run


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


def lines(output_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir) -> list[float]:
    return [line["loss"] for line in lines(output_dir) if "loss" in line]


def state_of(output_dir) -> dict:
    names = ("checkpoint.pth", "checkpoint.pth.tar")
    return load_latest(next(Path(output_dir) / name for name in names if (Path(output_dir) / name).exists()))
