"""A save killed before every line and in the middle of every write: one complete checkpoint is always there."""

import functools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.run import checkpoint
from tests.processes import SERVER
from tests.reliability import faults


def state(value: int) -> dict:
    return {"weight": torch.full((1000,), float(value)), "value": value}


def is_killed(path: Path, fault: Callable[[], None]) -> bool:
    """Save 2 over 1 in a process of its own; whether the fault killed it."""
    process = os.fork()
    if process == 0:
        fault()
        checkpoint.save(path, state(2), keep_as="kept.pth")
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def check_what_is_left(path: Path) -> None:
    newest, before = checkpoint.load_latest(path), checkpoint.load_latest(checkpoint.previous(path))
    assert newest["value"] in (1, 2) and before["value"] in (0, 1)
    assert torch.equal(newest["weight"], state(newest["value"])["weight"])
    kept = path.with_name("kept.pth")
    assert not kept.exists() or checkpoint.load_latest(kept)["value"] == 2
    # the run goes on and leaves nothing behind
    checkpoint.remove_leftovers(path)
    checkpoint.save(path, state(3), keep_as=kept.name)
    assert checkpoint.load_latest(path)["value"] == checkpoint.load_latest(kept)["value"] == 3
    assert checkpoint.load_latest(checkpoint.previous(path))["value"] == newest["value"]
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}.previous", kept.name}


def kill_everywhere(folder: Path, fault: Callable[[int], None], stride: int, boundaries) -> None:
    """Count in ``boundaries`` at how many points, every ``stride``-th, a kill met the save before it had ended."""
    torch.set_num_threads(1)
    path = folder / "before" / "checkpoint.pth"
    path.parent.mkdir()
    checkpoint.save(path, state(0))
    checkpoint.save(path, state(1))
    killed = True
    while killed:
        copy = shutil.copytree(path.parent, folder / str(boundaries.value)) / path.name
        killed = is_killed(copy, functools.partial(fault, stride * boundaries.value + 1))
        check_what_is_left(copy)
        boundaries.value += killed


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("fault", "at_least"), [(faults.kill_at_line, 60), (faults.kill_in_write, 30)])
def test_a_kill_at_any_point_of_a_save_leaves_a_complete_checkpoint(fault, at_least, stride, tmp_path):
    boundaries = SERVER.Value("i", 0)
    process = SERVER.Process(target=kill_everywhere, args=(tmp_path, fault, stride, boundaries))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    assert boundaries.value >= at_least // stride
