"""SwAV, DeepCluster-v2 and DeepCluster as jobs: the same numbers as under torchrun, also when they are interrupted."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from deepcluster import run_with_submitit as deepcluster_launcher
from swav import run_with_submitit as swav_launcher
from tests.reliability.runs import (
    DEEPCLUSTER,
    DEEPCLUSTERV2,
    ROOT,
    SWAV,
    Script,
    assert_same_run,
    log_lines,
    write_images,
)

pytestmark = pytest.mark.slow
JOB = "--partition main --nodes 2 --ngpus 0 --cpus_per_task 2 --mem_gb_per_gpu 1 --timeout 60"
LONGER = ("--epochs", "20")  # a job takes a moment to hear of a signal


@dataclass(frozen=True)
class Training:
    """A training of two processes, with a batch of four in all.

    Attributes:
        path: Of the script below the repository.
        launcher: ``main`` of the method's ``run_with_submitit.py``.
        options: Of the launcher alone.
        data_flag: What comes before the folder of images.
        batch: The flags that make two images per process.
    """

    path: str
    script: Script
    launcher: Callable[[list[str]], None]
    options: tuple[str, ...]
    data_flag: tuple[str, ...]
    batch: tuple[str, ...]

    def flags(self, images: Path) -> list[str]:
        return [*self.data_flag, str(images), *self.script.flags, *LONGER, *self.batch]


SWAV_LIKE = (("--data_path",), ("--batch_size", "2", "--checkpoint_freq", "0"))
TRAININGS = {
    "swav": Training("swav/main_swav.py", SWAV, swav_launcher.main, (), *SWAV_LIKE),
    "deepclusterv2": Training(
        "swav/main_deepclusterv2.py", DEEPCLUSTERV2, swav_launcher.main, ("--method", "deepclusterv2"), *SWAV_LIKE
    ),
    "deepcluster": Training(
        "deepcluster/main.py", DEEPCLUSTER, deepcluster_launcher.main, (), (), ("--checkpoints", "0")
    ),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module", params=TRAININGS.values(), ids=TRAININGS)
def training(request) -> Training:
    return request.param


@pytest.fixture(scope="module")
def torchrun(cluster, training, images, tmp_path_factory) -> Path:
    """Output folder of an uninterrupted run of two processes on this machine."""
    folder = tmp_path_factory.mktemp("torchrun") / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", training.path]
    arguments = [*training.flags(images), "--output_dir", str(folder)]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def wait_for_step(cluster, output_dir: Path, step: int) -> None:
    def reached() -> bool:
        return any(line["step"] >= step and "loss" in line for line in log_lines(output_dir))

    cluster.wait_for(reached, 300, f"step {step}")


def assert_ends_like(torchrun: Path, output_dir: Path, cluster, job_id: str) -> None:
    """The job ends after one restart, and has left what the uninterrupted run left."""
    assert cluster.wait_for_state(job_id, "COMPLETED", "FAILED", timeout_s=600) == "COMPLETED"
    assert cluster.show(job_id)["Restarts"] == "1"
    assert_same_run(output_dir, torchrun)


@pytest.mark.parametrize("interruption", ["warning", "requeue"])
def test_an_interrupted_job_on_two_nodes_equals_an_uninterrupted_run_under_torchrun(
    cluster, training, torchrun, images, tmp_path, capsys, interruption
):
    flags = [*training.flags(images), *training.options, *JOB.split(), "--output_dir", str(tmp_path / "run-%j")]
    training.launcher(flags)
    job_id = re.search(r"Submitted job (\d+)", capsys.readouterr().out)[1]
    output_dir = tmp_path / f"run-{job_id}"
    wait_for_step(cluster, output_dir, 14)  # within the third epoch
    stop = ("scancel", "--signal=USR2") if interruption == "warning" else ("scontrol", "requeue")
    cluster.run(*stop, job_id)
    assert_ends_like(torchrun, output_dir, cluster, job_id)


def test_an_interrupted_batch_script_with_torchrun_gives_the_same_run(cluster, training, torchrun, images, tmp_path):
    options = (
        f"--chdir={ROOT} --partition=main --gpus-per-node=0 --cpus-per-task=2 --mem=2G --time=60 "
        f"--output={tmp_path}/batch.out"
    ).split()
    script = (str(ROOT / "shared" / "torchrun.sbatch"), training.path)
    flags = (*training.flags(images), "--output_dir", str(tmp_path / "run"))
    job_id = cluster.run("sbatch", *options, *script, *flags).stdout.split()[-1]
    wait_for_step(cluster, tmp_path / "run", 14)
    cluster.run("scancel", "--batch", "--signal=USR2", job_id)  # as SLURM does before the time limit
    assert_ends_like(torchrun, tmp_path / "run", cluster, job_id)
