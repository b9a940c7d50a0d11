import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dino import main_dino, run_with_submitit

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--arch vit_tiny --patch_size 8 --global_crop_size 16 --local_crop_size 8 --local_crops_number 1 --out_dim 16 "
    "--batch_size_per_gpu 2 --epochs 1 --warmup_epochs 0 --eval_knn_freq 0 --pictures false --num_workers 0 "
    "--log_freq 1 --saveckp_freq 0"
)


@pytest.fixture
def training(tmp_path):
    """Flags of a run of 4 steps of 2 images."""
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.effect_noise((16, 16), 50).save(tmp_path / "images" / f"{i}.png")
    return [*TINY.split(), "--data_path", str(tmp_path / "images")]


@pytest.fixture
def submitted(monkeypatch):
    """The arguments that would have been submitted."""
    calls = []
    monkeypatch.setattr(run_with_submitit.slurm, "submit", lambda train, args: calls.append((train, args)))
    return calls


def test_every_training_flag_is_accepted_with_its_default(submitted):
    run_with_submitit.main(["--data_path", "images"])
    train, args = submitted[0]
    assert train is main_dino.train_dino
    assert vars(main_dino.parse_args(["--data_path", "images"])).items() <= vars(args).items()


def test_the_published_command_parses(submitted):
    command = (
        "--nodes 2 --ngpus 8 --arch vit_small --epochs 300 --teacher_temp 0.07 --warmup_teacher_temp_epochs 30 "
        "--norm_last_layer false --data_path /images/train --output_dir /run --timeout 2880 --partition gpu "
        "--use_volta32 --comment deadline"
    )
    run_with_submitit.main(command.split())
    _, args = submitted[0]
    assert (args.nodes, args.ngpus, args.timeout, args.partition, args.comment) == (2, 8, 2880, "gpu", "deadline")
    assert args.use_volta32 is True
    assert args.norm_last_layer is False
    assert args.job_name == "dino"


def test_the_embedded_data_bring_their_own_defaults(submitted):
    run_with_submitit.main([])
    _, args = submitted[0]
    assert args.out_dim == main_dino.EMBEDDED_DATA_DEFAULTS["out_dim"]


def test_a_job_that_makes_no_sense_ends_with_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        run_with_submitit.main(["--nodes", "0", "--cluster", "local"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: --nodes 0")


def test_debug_trains_in_this_process(training, tmp_path):
    run_with_submitit.main([*training, "--cluster", "debug", "--device", "cpu", "--output_dir", str(tmp_path / "%j")])
    lines = [json.loads(line) for line in (tmp_path / "debug" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert (tmp_path / "debug" / "checkpoint.pth").exists()


@pytest.mark.slow
def test_local_processes_train_together(training, tmp_path):
    job = ("--cluster", "local", "--ngpus", "0", "--tasks_per_node", "2", "--output_dir", str(tmp_path))
    subprocess.run(
        [sys.executable, "run_with_submitit.py", *training, *job], cwd=ROOT / "dino", check=True, timeout=300
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]  # two processes halve the number of steps
