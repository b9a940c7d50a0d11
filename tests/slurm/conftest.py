import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.launch import slurm
from shared.run.log import read_log
from tests.slurm import jobs
from tests.slurm.cluster import Cluster, missing


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three nodes, all idle; the clients on this process's PATH talk to them."""
    if (reason := missing()) is not None:
        pytest.skip(f"no SLURM here: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # pytest's own folders hide the sockets from munged
    cluster = Cluster(folder, num_nodes=3)
    environment = dict(os.environ)
    try:
        cluster.start()
        os.environ.update(cluster.environment, OMP_NUM_THREADS="1")
        yield cluster
    finally:
        os.environ.clear()
        os.environ.update(environment)
        cluster.stop()
        shutil.rmtree(folder)


class Run:
    """A job of two nodes that counts (``jobs.count``), and what its user sees of it."""

    def __init__(self, cluster: Cluster, output_dir: Path, *flags: str, train: Callable = jobs.count):
        parser = argparse.ArgumentParser()
        parser.add_argument("--output_dir", default=str(output_dir))
        parser.add_argument("--steps", type=int, default=12)
        parser.add_argument("--step_s", type=float, default=0.2)
        parser.add_argument("--save_every", type=int, default=0)
        slurm.add_slurm_flags(parser)
        small = "--partition main --nodes 2 --ngpus 0 --cpus_per_task 2 --mem_gb_per_gpu 0.2 --timeout 60"
        self.args = parser.parse_args([*small.split(), *flags])
        self.cluster = cluster
        self.output_dir = output_dir
        self.job = slurm.submit(train, self.args)
        self.id = self.job.job_id

    def lines(self) -> list[dict]:
        path = self.output_dir / "metrics.jsonl"
        return read_log(path) if path.exists() else []

    def wait_for_step(self, step: int, timeout_s: float = 180) -> None:
        self.cluster.wait_for(lambda: len(self.lines()) >= step, timeout_s, f"step {step} of job {self.id}")

    def ends(self, timeout_s: float = 300) -> str:
        """The state in which the job leaves the queue for good."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        state = self.cluster.wait_for_state(self.id, *ended, timeout_s=timeout_s)
        for rank in range(self.job.num_tasks):  # shown when the test fails
            print(f"-- rank {rank} of job {self.id}, {state}\n{self.output(rank)}")
        return state

    def output(self, rank: int) -> str:
        """Standard output and error of a process, over all attempts."""
        paths = self.job.task(rank).paths
        return "".join(path.read_text() for path in (paths.stdout, paths.stderr) if path.exists())

    def restarts(self) -> int:
        return int(self.cluster.show(self.id)["Restarts"])

    def assert_every_step_counted_once(self) -> None:
        lines = self.lines()
        assert [line["step"] for line in lines] == list(range(1, self.args.steps + 1))
        ranks = self.job.num_tasks
        for line in lines:  # sum over steps t < T and ranks r < W of (r + 1) * t
            assert line["total"] == ranks * (ranks + 1) / 2 * (line["step"] * (line["step"] - 1) / 2)


@pytest.fixture
def submit(cluster, tmp_path) -> Iterator[Callable[..., Run]]:
    """Submit runs of this test; afterwards those still in the queue are cancelled, and broken nodes repaired."""
    runs = []

    def start(*flags: str, **options) -> Run:
        runs.append(Run(cluster, tmp_path / "run", *flags, **options))
        return runs[-1]

    yield start
    for run in runs:
        cluster.run("scancel", run.id)
        run.ends()
    cluster.repair()
