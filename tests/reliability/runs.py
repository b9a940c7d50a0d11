"""Training runs that a test starts, disturbs, and compares.

A run is a process of its own that calls the ``main()`` of a training script, main_dino.py if nothing else is said. It
is forked from a server that has imported torch already, so a start takes a fraction of a second; its networks are tiny.
"""

import importlib
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shared.run.checkpoint import load_latest
from shared.run.log import read_log
from tests.dino.tiny import TRAININGS
from tests.processes import SERVER, free_port, rank_environment
from tests.tiny_training import Training

ROOT = Path(__file__).resolve().parents[2]
STEPS_PER_EPOCH = 6
TIMINGS = ("images_per_s", "pairs_per_s", "sentences_per_s", "data_wait")
CHECKPOINTS = (".pth", ".tar")
DINO = TRAININGS["dino"]


def write_images(folder: Path, count: int = 4 * STEPS_PER_EPOCH) -> Path:
    """Small noise images in three class folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return folder


class Run:
    """One process of a training that has just been started.

    Args:
        output_dir: Of the training; what the process prints is in a file beside it.
        flags: Added to those of the script.
        fault: Called in the process before the training, to disturb it from inside.
        environment: Variables of the process, such as its rank.
        script: What to run; DINO by default.
    """

    def __init__(
        self,
        output_dir: Path,
        *flags,
        fault: Callable[[], None] | None = None,
        environment: dict[str, str] | None = None,
        script: Training | None = None,
    ):
        script = script or DINO
        self.output_dir = output_dir
        self.printed = output_dir.with_suffix(f".{time.monotonic_ns()}.txt")
        arguments = [*script.flags, "--output_dir", str(output_dir), *map(str, flags)]
        self.process = SERVER.Process(target=_train, args=(script, arguments, environment or {}, self.printed, fault))
        self.process.start()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL now, unless the run has ended by itself."""
        self.process.kill()
        self.process.join()

    def exit_code(self, timeout_s: float = 120) -> int:
        """Exit code, negative for a signal, once the process has ended."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"still running after {timeout_s} s:\n{self.output()}")
        return self.process.exitcode

    def assert_ends(self, exit_code: int = 0, timeout_s: float = 120) -> str:
        """Wait for this exit code and return what was printed."""
        ended_with = self.exit_code(timeout_s)
        assert ended_with == exit_code, f"exit code {ended_with}:\n{self.output()}"
        return self.output()

    def output(self) -> str:
        return self.printed.read_text() if self.printed.exists() else ""

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert self.process.is_alive(), f"ended with {self.process.exitcode}:\n{self.output()}"
            assert time.monotonic() < end, self.output()
            time.sleep(0.005)

    def wait_for_step(self, step: int) -> None:
        """Wait until the log has a line for ``step`` steps or more."""
        self.wait_for(lambda: any(line["step"] >= step for line in log_lines(self.output_dir)))


def start_ranks(
    output_dir: Path,
    world_size: int,
    *flags,
    fault: Callable[[], None] | None = None,
    script: Training | None = None,
) -> list[Run]:
    """The processes of one training, in rank order."""
    port = free_port()
    environments = [rank_environment(rank, world_size, port) for rank in range(world_size)]
    return [Run(output_dir, *flags, fault=fault, script=script, environment=e) for e in environments]


def kill_at_random_instants(
    folder: Path, kills: int, *flags, script: Training | None = None, within_s: float = 2
) -> list[Path]:
    """Runs that are killed and started again, with 0 to 2 loader processes, until so many kills have hit one of them.

    Returns:
        Output folders, below ``folder``, of the runs that came to their end.
    """
    rng = random.Random(kills)
    killed, finished = 0, []
    while killed < kills:
        output_dir = folder / str(len(finished))
        while True:
            workers = ("--num_workers", killed % 3) if script is None or script.has_workers else ()
            run = Run(output_dir, *flags, *workers, script=script)
            if killed < kills:
                run.wait_for((output_dir / "attempt.json").exists)
                time.sleep(rng.uniform(0, within_s))
                run.kill()
            if run.exit_code() == 0:
                break
            assert run.exit_code() == -9, run.output()
            killed += 1
        finished.append(output_dir)
    return finished


def _train(
    script: Training, arguments: list[str], variables: dict[str, str], printed: Path, fault: Callable[[], None] | None
) -> None:
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(variables)
    multiprocessing.set_start_method("fork", force=True)  # for loader processes, as in a script
    torch.set_num_threads(1)
    if script.prepare is not None:
        script.prepare()
    if fault is not None:
        fault()
    module = importlib.import_module(script.module)
    sys.argv = [module.__file__, *arguments]
    module.main()


def log_lines(output_dir: Path) -> list[dict]:
    """Complete lines of ``metrics.jsonl`` without what a clock has measured."""
    path = output_dir / "metrics.jsonl"
    lines = read_log(path) if path.exists() else []
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Checkpoints equal tensor by tensor, logs equal line by line."""
    assert log_lines(one) == log_lines(other)
    for name in ("log.txt", *(path.name for path in other.glob("*.csv"))):
        assert (one / name).read_text() == (other / name).read_text()
    names = checkpoints(other)
    assert checkpoints(one) == names
    for name in names:
        a, b = load_latest(one / name), load_latest(other / name)
        for state in (a, b):
            state["log"].pop("lengths")  # the clock's numbers are in the files
            state.pop("args")
        assert_same(a, b, str(name))


def checkpoints(output_dir: Path) -> list[Path]:
    """Files of weights below a run's folder."""
    return sorted(path.relative_to(output_dir) for path in output_dir.rglob("*") if path.suffix in CHECKPOINTS)


def assert_same(a, b, name: str) -> None:
    """Nested dictionaries and lists are equal, tensors bit by bit."""
    assert type(a) is type(b), name
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    elif isinstance(a, dict):
        assert list(a) == list(b), name
        for key in a:
            assert_same(a[key], b[key], f"{name} {key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{name} {i}")
    else:
        assert a == b, name
