"""Every method as a job: the same numbers as under torchrun, also when the job is interrupted."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.runs import ROOT, assert_same_run, log_lines
from tests.tiny_training import Training, trainings

JOB = "--partition main --nodes 2 --ngpus 0 --cpus_per_task 2 --mem_gb_per_gpu 1 --timeout 60"
STEPS = 14  # a job is interrupted after so many, within an epoch
# a job takes a moment to hear of a signal, so all of them are longer than the runs of tests/reliability
TRAININGS = {name: training for name, training in trainings().items() if training.job}


@pytest.fixture(scope="module", params=TRAININGS.values(), ids=TRAININGS)
def training(request) -> Training:
    return request.param


@pytest.fixture(scope="module")
def flags(training, places) -> list[str]:
    return [*training.data_flags(places), *training.flags, *training.pair, *training.whole, *training.job]


@pytest.fixture(scope="module")
def torchrun(cluster, training, flags, tmp_path_factory) -> Path:
    """Output folder of an uninterrupted run of two processes on this machine."""
    folder = tmp_path_factory.mktemp("torchrun") / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", _path(training)]
    arguments = [*flags, "--output_dir", str(folder)]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def _path(training: Training) -> str:
    return training.module.replace(".", "/") + ".py"


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
    cluster, training, torchrun, flags, tmp_path, capsys, interruption
):
    """A requeue is a SIGTERM to every process of the job, those of the loader included."""
    workers = ["--num_workers", "1"] if interruption == "requeue" and training.has_workers else []
    training.launch([*flags, *workers, *JOB.split(), "--output_dir", str(tmp_path / "run-%j")])
    job_id = re.search(r"Submitted job (\d+)", capsys.readouterr().out)[1]
    output_dir = tmp_path / f"run-{job_id}"
    wait_for_step(cluster, output_dir, STEPS)
    stop = ("scancel", "--signal=USR2") if interruption == "warning" else ("scontrol", "requeue")
    cluster.run(*stop, job_id)
    assert_ends_like(torchrun, output_dir, cluster, job_id)


@pytest.mark.parametrize(
    ("training", "reason"),
    [
        *((TRAININGS[name], "time limit") for name in ("dino", "swav", "msn")),
        (TRAININGS["dino"], "preemption"),
    ],
    indirect=["training"],
)
def test_an_interrupted_batch_script_with_torchrun_gives_the_same_run(
    cluster, training, torchrun, flags, tmp_path, reason
):
    options = (
        f"--chdir={ROOT} --partition=main --gpus-per-node=0 --cpus-per-task=2 --mem=2G --time=60 "
        f"--output={tmp_path}/batch.out"
    ).split()
    script = (str(ROOT / "shared" / "torchrun.sbatch"), _path(training))
    with cluster.without("SlurmctldParameters") if reason == "preemption" else contextlib.nullcontext():
        answer = cluster.run("sbatch", *options, *script, *flags, "--output_dir", str(tmp_path / "run"))
        job_id = answer.stdout.split()[-1]
        wait_for_step(cluster, tmp_path / "run", STEPS)
        if reason == "preemption":
            cluster.preempt()
        else:
            cluster.run("scancel", "--batch", "--signal=USR2", job_id)  # as SLURM does before the time limit
        assert_ends_like(torchrun, tmp_path / "run", cluster, job_id)
