"""DINO itself as a job: the same numbers as under torchrun, also when the job is interrupted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dino import run_with_submitit
from shared.weights import safe_load

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


def test_an_interrupted_job_on_two_nodes_equals_an_uninterrupted_run_under_torchrun(cluster, tmp_path, capsys):
    torchrun, training = tmp_path / "torchrun", [*TRAINING.split(), "--data_path", str(tmp_path / "images")]
    write_images(tmp_path / "images", count=2 * 8 * STEPS)
    run_with_submitit.main([*training, *JOB.split(), "--output_dir", str(tmp_path / "%j")])
    job_id = capsys.readouterr().out.split()[2].rstrip(":")
    slurm = tmp_path / job_id
    log = slurm / "metrics.jsonl"
    cluster.wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 2, 120, "step 2")
    cluster.run("scancel", "--signal=USR2", job_id)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main_dino.py"]
    subprocess.run(
        [*command, *training, "--device", "cpu", "--output_dir", str(torchrun)],
        cwd=ROOT / "dino",
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert cluster.wait_for_state(job_id, "COMPLETED", "FAILED", timeout_s=180) == "COMPLETED"
    assert cluster.show(job_id)["Restarts"] == "1"

    assert [step for step, *_ in loss_log(torchrun)] == list(range(1, STEPS + 1))
    assert loss_log(slurm) == loss_log(torchrun)
    ours, theirs = safe_load(slurm / "checkpoint.pth"), safe_load(torchrun / "checkpoint.pth")
    for network in ("student", "teacher"):
        for name, weight in theirs[network].items():
            assert torch.equal(ours[network][name], weight), f"{network} {name}"
    assert torch.equal(ours["dino_loss"]["center"], theirs["dino_loss"]["center"])
