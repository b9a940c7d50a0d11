"""Every other method as a job: the same numbers as under torchrun, also when the job is interrupted."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from contriever import run_with_submitit as contriever_launcher
from deepcluster import run_with_submitit as deepcluster_launcher
from msn import main_distributed as msn_launcher
from paws import main_distributed as paws_launcher
from resmlp import run_with_submitit as resmlp_launcher
from swav import run_with_submitit as swav_launcher
from tests.contriever.tiny import CONTRIEVER, make_data
from tests.reliability import runs
from tests.reliability.runs import ROOT, assert_same_run, log_lines, write_images
from tests.reliability.test_msn import MSN
from tests.reliability.test_paws import PAWS
from tests.reliability.test_resmlp import SUPERVISED as RESMLP
from tests.reliability.test_xcit import XCIT
from xcit import run_with_submitit as xcit_launcher

pytestmark = pytest.mark.slow
JOB = "--partition main --nodes 2 --ngpus 0 --cpus_per_task 2 --mem_gb_per_gpu 1 --timeout 60"
STEPS = 14  # a job is interrupted after so many, within an epoch


@dataclass(frozen=True)
class Training:
    """A training of two processes, with a batch of four in all.

    Attributes:
        path: Of the script below the repository.
        launch: Submits a job with the flags that it is given.
        flags: Of the training, with ``{images}``, ``{tokens}`` and ``{encoder}`` for the data.
        options: Of the launcher alone.
    """

    path: str
    launch: Callable[[list[str]], None]
    flags: tuple[str, ...]
    options: tuple[str, ...] = ()


# a job takes a moment to hear of a signal, so all of them are longer than the runs of tests/reliability
SWAV_LIKE = "--data_path {images} --epochs 20 --batch_size 2 --checkpoint_freq 0".split()
TRAININGS = {
    "swav": Training("swav/main_swav.py", swav_launcher.main, (*runs.SWAV.flags, *SWAV_LIKE)),
    "deepclusterv2": Training(
        "swav/main_deepclusterv2.py",
        swav_launcher.main,
        (*runs.DEEPCLUSTERV2.flags, *SWAV_LIKE),
        ("--method", "deepclusterv2"),
    ),
    "deepcluster": Training(
        "deepcluster/main.py",
        deepcluster_launcher.main,
        ("{images}", *runs.DEEPCLUSTER.flags, *"--epochs 20 --checkpoints 0".split()),
    ),
    "msn": Training(
        "msn/main.py",
        msn_launcher.submit,
        (
            *MSN.flags,
            *"--data_path {images} --model_name deit_micro --epochs 20 --batch_size 2 --checkpoint_freq 0".split(),
        ),
    ),
    "paws": Training(
        "paws/main.py",
        paws_launcher.main,
        (*PAWS.flags, *"--data_path {images} --epochs 20 --unsupervised_batch_size 2 --checkpoint_freq 0".split()),
    ),
    "xcit": Training(  # steps of a whole nano network are slow enough
        "xcit/main.py", xcit_launcher.main, (*XCIT.flags, *"--data_path {images} --epochs 8 --batch-size 2".split())
    ),
    "resmlp": Training(
        "resmlp/main.py",
        resmlp_launcher.main,
        (*RESMLP.flags, *"--data_path {images} --epochs 20 --batch-size 2".split()),
    ),
    "contriever": Training(
        "contriever/train.py",
        contriever_launcher.main,
        (
            *CONTRIEVER.flags,
            *"--train_data {tokens} --retriever_model_id {encoder} --total_steps 120 --per_gpu_batch_size 2 "
            "--save_freq 0 --eval_freq 0".split(),
        ),
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    folder = make_data(tmp_path_factory.mktemp("data"))
    return {
        "images": write_images(folder / "images"),
        "tokens": folder / "tokens",
        "encoder": folder / "encoder",
    }


@pytest.fixture(scope="module", params=TRAININGS.values(), ids=TRAININGS)
def training(request) -> Training:
    return request.param


@pytest.fixture(scope="module")
def flags(training, data) -> list[str]:
    return [flag.format(**data) for flag in training.flags]


@pytest.fixture(scope="module")
def torchrun(cluster, training, flags, tmp_path_factory) -> Path:
    """Output folder of an uninterrupted run of two processes on this machine."""
    folder = tmp_path_factory.mktemp("torchrun") / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", training.path]
    arguments = [*flags, "--output_dir", str(folder)]
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
    cluster, training, torchrun, flags, tmp_path, capsys, interruption
):
    training.launch([*flags, *training.options, *JOB.split(), "--output_dir", str(tmp_path / "run-%j")])
    job_id = re.search(r"Submitted job (\d+)", capsys.readouterr().out)[1]
    output_dir = tmp_path / f"run-{job_id}"
    wait_for_step(cluster, output_dir, STEPS)
    stop = ("scancel", "--signal=USR2") if interruption == "warning" else ("scontrol", "requeue")
    cluster.run(*stop, job_id)
    assert_ends_like(torchrun, output_dir, cluster, job_id)


@pytest.mark.parametrize("training", [TRAININGS["swav"], TRAININGS["msn"]], ids=["swav", "msn"], indirect=True)
def test_an_interrupted_batch_script_with_torchrun_gives_the_same_run(cluster, training, torchrun, flags, tmp_path):
    options = (
        f"--chdir={ROOT} --partition=main --gpus-per-node=0 --cpus-per-task=2 --mem=2G --time=60 "
        f"--output={tmp_path}/batch.out"
    ).split()
    script = (str(ROOT / "shared" / "torchrun.sbatch"), training.path)
    job_id = cluster.run("sbatch", *options, *script, *flags, "--output_dir", str(tmp_path / "run")).stdout.split()[-1]
    wait_for_step(cluster, tmp_path / "run", STEPS)
    cluster.run("scancel", "--batch", "--signal=USR2", job_id)  # as SLURM does before the time limit
    assert_ends_like(torchrun, tmp_path / "run", cluster, job_id)
