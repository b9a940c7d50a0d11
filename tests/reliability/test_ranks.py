"""Runs of several processes: one is lost, or all are."""

import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import free_port
from tests.reliability import faults
from tests.reliability.runs import DINO, ROOT, assert_same_run, log_lines, start_ranks

FLAGS = ("--batch_size_per_gpu", 2)


@pytest.fixture(scope="module")
def uninterrupted_pair(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair") / "run"
    for rank in start_ranks(folder, 2, "--data_path", images, *FLAGS):
        rank.assert_ends()
    return folder


@pytest.mark.parametrize("lost", [0, 1])
def test_the_others_end_within_ten_seconds_and_name_the_rank_that_was_killed(
    lost, images, uninterrupted_pair, tmp_path
):
    flags = ("--data_path", images, *FLAGS)
    ranks = start_ranks(tmp_path / "run", 2, *flags, fault=functools.partial(faults.slow_steps, 0.1))
    ranks[0].wait_for_step(2)
    ranks[lost].kill()
    killed_at = time.monotonic()
    printed = ranks[1 - lost].assert_ends(4, timeout_s=30)
    assert time.monotonic() - killed_at < 10
    assert f"error (rank {1 - lost}): lost the connection to rank {lost} of 2" in printed
    assert "Traceback" not in printed
    for rank in start_ranks(tmp_path / "run", 2, *flags):
        rank.assert_ends()
    assert_same_run(tmp_path / "run", uninterrupted_pair)


def test_of_three_ranks_every_survivor_ends_and_one_of_them_names_the_lost_one_alone(images, tmp_path):
    flags = ("--data_path", images, *FLAGS)
    ranks = start_ranks(tmp_path / "run", 3, *flags, fault=functools.partial(faults.slow_steps, 0.1))
    ranks[0].wait_for_step(2)
    ranks[2].kill()
    printed = [ranks[r].assert_ends(4, timeout_s=30) for r in (0, 1)]
    assert any("lost the connection to rank 2 of 3" in text for text in printed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_two_ranks_killed_together_at_random_instants_end_like_an_uninterrupted_pair(
    seed, images, uninterrupted_pair, tmp_path
):
    rng = random.Random(seed)
    for kill in range(3):
        ranks = start_ranks(tmp_path / "run", 2, "--data_path", images, *FLAGS, "--num_workers", kill)
        time.sleep(rng.uniform(1, 4))
        for rank in ranks:
            rank.kill()
    for rank in start_ranks(tmp_path / "run", 2, "--data_path", images, *FLAGS):
        rank.assert_ends()
    assert_same_run(tmp_path / "run", uninterrupted_pair)


class Torchrun:
    """The real script on two processes."""

    def __init__(self, output_dir, *flags, options=()):
        self.output_dir = output_dir
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *options]
        command += [f"--master_port={free_port()}", "main_dino.py", "--arch", "vit_tiny", *DINO.flags]
        self.printed = open(output_dir.with_suffix(".txt"), "a+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*map(str, command), "--output_dir", str(output_dir), *map(str, flags)],
            cwd=ROOT / "dino",
            env=environment,
            stdout=self.printed,
            stderr=subprocess.STDOUT,
        )

    def kill_everything(self) -> None:
        workers = self.workers()
        assert len(workers) == 2
        for pid in (self.process.pid, *workers):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def workers(self) -> list[int]:
        """Process ids of the ranks, all of them alive."""
        commands = {path: path.read_text().split("\0") for path in Path("/proc").glob("[0-9]*/cmdline")}
        return [
            int(path.parent.name)
            for path, command in commands.items()
            if str(self.output_dir) in command and "torch.distributed.run" not in command
        ]

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + 300
        while not any(line["step"] >= step for line in log_lines(self.output_dir)):
            assert self.process.poll() is None and time.monotonic() < end, self.output()
            time.sleep(0.01)

    def output(self) -> str:
        self.printed.seek(0)
        return self.printed.read()

    def assert_ends_well(self) -> None:
        assert self.process.wait(300) == 0, self.output()


@pytest.fixture(scope="module")
def uninterrupted_torchrun(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun") / "run"
    Torchrun(folder, "--data_path", images, *FLAGS).assert_ends_well()
    return folder


@pytest.mark.slow
def test_torchrun_killed_with_all_its_processes_ends_like_an_uninterrupted_one(
    images, uninterrupted_torchrun, tmp_path
):
    rng = random.Random(0)
    for step in (2, 4, 8):
        run = Torchrun(tmp_path / "run", "--data_path", images, *FLAGS)
        run.wait_for_step(step)
        time.sleep(rng.uniform(0, 0.5))
        run.kill_everything()
    Torchrun(tmp_path / "run", "--data_path", images, *FLAGS).assert_ends_well()
    assert_same_run(tmp_path / "run", uninterrupted_torchrun)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker_from_the_last_checkpoint(images, uninterrupted_torchrun, tmp_path):
    run = Torchrun(tmp_path / "run", "--data_path", images, *FLAGS, options=["--max-restarts=1"])
    run.wait_for_step(4)
    os.kill(max(run.workers()), signal.SIGKILL)
    run.assert_ends_well()
    assert "resuming at epoch" in run.output()
    assert_same_run(tmp_path / "run", uninterrupted_torchrun)
