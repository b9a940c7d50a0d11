"""DINO itself as a job: the same numbers as under torchrun, also when the job is interrupted."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino import run_with_submitit
from shared.networks.weights import safe_load

ROOT = Path(__file__).resolve().parents[2]
TRAINING = (
    "--arch vit_tiny --patch_size 8 --global_crop_size 16 --local_crop_size 8 --local_crops_number 2 --out_dim 64 "
    "--batch_size_per_gpu 8 --epochs 1 --warmup_epochs 0 --freeze_last_layer 0 --eval_knn_freq 0 --pictures false "
    "--num_workers 0 --log_freq 1"
)
JOB = "--partition main --nodes 2 --ngpus 0 --cpus_per_task 2 --mem_gb_per_gpu 1 --timeout 60"
STEPS = 6


def write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, size=(count, 16, 16, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def loss_log(output_dir: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["lr"]) for line in lines]


@pytest.fixture(scope="module")
def torchrun(cluster, tmp_path_factory) -> Path:
    """Output folder of an uninterrupted run of two processes on this machine."""
    folder = tmp_path_factory.mktemp("torchrun")
    write_images(folder / "images", count=2 * 8 * STEPS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main_dino.py"]
    subprocess.run(
        [*command, *training_flags(folder), "--output_dir", str(folder)],
        cwd=ROOT / "dino",
        check=True,
        capture_output=True,
        timeout=600,
    )
    assert [step for step, *_ in loss_log(folder)] == list(range(1, STEPS + 1))
    return folder


def training_flags(folder: Path) -> list[str]:
    return [*TRAINING.split(), "--device", "cpu", "--data_path", str(folder / "images")]


def wait_for_step(cluster, output_dir: Path, step: int) -> None:
    log = output_dir / "metrics.jsonl"
    cluster.wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= step, 300, f"step {step}")


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert loss_log(ours) == loss_log(theirs)
    ours, theirs = safe_load(ours / "checkpoint.pth"), safe_load(theirs / "checkpoint.pth")
    for network in ("student", "teacher", "dino_loss"):
        for name, tensor in theirs[network].items():
            assert torch.equal(ours[network][name], tensor), f"{network} {name}"


def test_an_interrupted_job_on_two_nodes_equals_an_uninterrupted_run_under_torchrun(
    cluster, torchrun, tmp_path, capsys
):
    run_with_submitit.main([*training_flags(torchrun), *JOB.split(), "--output_dir", str(tmp_path / "run-%j")])
    job_id = re.search(r"Submitted job (\d+)", capsys.readouterr().out)[1]
    wait_for_step(cluster, tmp_path / f"run-{job_id}", 2)
    cluster.run("scancel", "--signal=USR2", job_id)
    assert cluster.wait_for_state(job_id, "COMPLETED", "FAILED", timeout_s=600) == "COMPLETED"
    assert cluster.show(job_id)["Restarts"] == "1"
    assert_same_run(tmp_path / f"run-{job_id}", torchrun)


@pytest.mark.slow
def test_a_termination_that_reaches_the_loader_workers_too_still_saves(cluster, torchrun, tmp_path, capsys):
    flags = [*training_flags(torchrun), "--num_workers", "1"]
    run_with_submitit.main([*flags, *JOB.split(), "--output_dir", str(tmp_path)])
    job_id = re.search(r"Submitted job (\d+)", capsys.readouterr().out)[1]
    wait_for_step(cluster, tmp_path, 2)
    cluster.run("scontrol", "requeue", job_id)  # SIGTERM to every process of the step
    assert cluster.wait_for_state(job_id, "COMPLETED", "FAILED", timeout_s=600) == "COMPLETED"
    output = (tmp_path / "submitit" / f"{job_id}_0_log.out").read_text()
    assert re.search("resuming at epoch 0, step [2-6]", output)
    assert_same_run(tmp_path, torchrun)


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["time limit", "preemption"])
def test_an_interrupted_batch_script_with_torchrun_gives_the_same_run(cluster, torchrun, tmp_path, reason):
    options = (
        f"--chdir={ROOT} --partition=main --gpus-per-node=0 --cpus-per-task=2 --mem=2G --time=60 "
        f"--output={tmp_path}/batch.out"
    ).split()
    script = (str(ROOT / "shared" / "torchrun.sbatch"), "dino/main_dino.py")
    flags = (*training_flags(torchrun), "--output_dir", str(tmp_path / "run"))
    with cluster.without("SlurmctldParameters") if reason == "preemption" else contextlib.nullcontext():
        answer = cluster.run("sbatch", *options, *script, *flags)
        job_id = answer.stdout.split()[-1]
        wait_for_step(cluster, tmp_path / "run", 2)
        if reason == "preemption":
            cluster.preempt()
        else:
            cluster.run("scancel", "--batch", "--signal=USR2", job_id)  # as SLURM does before the time limit
        assert cluster.wait_for_state(job_id, "COMPLETED", "FAILED", timeout_s=600) == "COMPLETED"
    assert cluster.show(job_id)["Restarts"] == "1"
    assert_same_run(tmp_path / "run", torchrun)
