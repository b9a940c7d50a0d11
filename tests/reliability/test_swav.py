"""SIGKILL at any instant of SwAV and DeepCluster-v2: queue, memory and clusters come back bit for bit."""

import random
import time

import pytest

from shared.checkpoint import load_latest
from tests.reliability.runs import Run, Script, assert_same_run, log_lines, start_ranks

FLAGS = (
    "--arch test_resnet --nmb_crops 2 2 --size_crops 32 16 --min_scale_crops 0.3 0.1 --max_scale_crops 1 0.3 "
    "--feat_dim 4 --hidden_mlp 8 --batch_size 4 --base_lr 0.5 --warmup_epochs 0 --epochs 2 "
    "--freeze_prototypes_niters 3 --device cpu --workers 0 --log_freq 2 --eval_knn_freq 0 --pictures off "
    "--checkpoint_freq 1 --saveckp_steps 1"
).split()
SWAV = Script("swav.main_swav", (*FLAGS, *"--nmb_prototypes 6 --queue_length 16 --epoch_queue_starts 0".split()))
DEEPCLUSTERV2 = Script("swav.main_deepclusterv2", (*FLAGS, "--nmb_prototypes", "6", "5"))
SCRIPTS = pytest.mark.parametrize("script", [SWAV, DEEPCLUSTERV2], ids=["swav", "deepclusterv2"])


@SCRIPTS
@pytest.mark.parametrize("kills", [3, 20])
def test_runs_killed_at_random_instants_end_like_an_uninterrupted_one(script, kills, images, tmp_path):
    uninterrupted = tmp_path / "uninterrupted"
    Run(uninterrupted, "--data_path", images, script=script).assert_ends()
    rng = random.Random(kills)
    killed, finished = 0, 0
    while killed < kills:
        folder = tmp_path / str(finished)
        while True:
            run = Run(folder, "--data_path", images, "--workers", killed % 3, script=script)
            if killed < kills:
                run.wait_for(lambda folder=folder: (folder / "attempt.json").exists())
                time.sleep(rng.uniform(0, 2))
                run.kill()
            if run.exit_code() == 0:
                break
            assert run.exit_code() == -9, run.output()
            killed += 1
        finished += 1
        assert_same_run(folder, uninterrupted)
        assert [line["step"] for line in log_lines(folder)] == [2, 4, 6, 8, 10, 12]


@SCRIPTS
def test_two_ranks_killed_together_end_like_an_uninterrupted_pair(script, images, tmp_path):
    flags = ("--data_path", images, "--batch_size", 2)
    for rank in start_ranks(tmp_path / "uninterrupted", 2, *flags, script=script):
        rank.assert_ends()
    for step in (2, 4, 8):
        ranks = start_ranks(tmp_path / "run", 2, *flags, script=script)
        ranks[0].wait_for_step(step)
        for rank in ranks:
            rank.kill()
    for rank in start_ranks(tmp_path / "run", 2, *flags, script=script):
        rank.assert_ends()
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")
    state = load_latest(tmp_path / "run/checkpoint.pth.tar")
    shape = state["queue"]["embeddings"].shape if script is SWAV else state["memory"]["embeddings"].shape
    assert shape == ((2, 2, 8, 4) if script is SWAV else (2, 2, 12, 4))
