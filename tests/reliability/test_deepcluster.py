"""SIGKILL at any instant of DeepCluster: clusters, top layer and momentum come back bit for bit."""

import random
import time

import pytest

from shared.checkpoint import load_latest
from tests.reliability.runs import Run, Script, assert_same_run, log_lines, start_ranks

FLAGS = (
    "--arch test_resnet --crop_size 32 --k 5 --pca_dim 4 --batch 4 --epochs 2 --device cpu --workers 0 --log_freq 2 "
    "--eval_knn_freq 0 --pictures off --saveckp_steps 1 --checkpoints 5"
)
DEEPCLUSTER = Script("deepcluster.main", tuple(FLAGS.split()))


def assert_same_end(one, other):
    assert_same_run(one, other)
    assert (one / "clusters.csv").read_text() == (other / "clusters.csv").read_text()


@pytest.mark.parametrize("kills", [3, 20])
def test_runs_killed_at_random_instants_end_like_an_uninterrupted_one(kills, images, tmp_path):
    uninterrupted = tmp_path / "uninterrupted"
    Run(uninterrupted, images, script=DEEPCLUSTER).assert_ends()
    rng = random.Random(kills)
    killed, finished = 0, 0
    while killed < kills:
        folder = tmp_path / str(finished)
        while True:
            run = Run(folder, images, "--workers", killed % 3, script=DEEPCLUSTER)
            if killed < kills:
                run.wait_for(lambda folder=folder: (folder / "attempt.json").exists())
                time.sleep(rng.uniform(0, 2))
                run.kill()
            if run.exit_code() == 0:
                break
            assert run.exit_code() == -9, run.output()
            killed += 1
        finished += 1
        assert_same_end(folder, uninterrupted)
        assert [line["step"] for line in log_lines(folder) if "loss" in line] == [2, 4, 6, 8, 10, 12]


def test_two_ranks_killed_together_end_like_an_uninterrupted_pair(images, tmp_path):
    for rank in start_ranks(tmp_path / "uninterrupted", 2, images, script=DEEPCLUSTER):
        rank.assert_ends()
    for step in (2, 6, 8):
        ranks = start_ranks(tmp_path / "run", 2, images, script=DEEPCLUSTER)
        ranks[0].wait_for_step(step)
        for rank in ranks:
            rank.kill()
    for rank in start_ranks(tmp_path / "run", 2, images, script=DEEPCLUSTER):
        rank.assert_ends()
    assert_same_end(tmp_path / "run", tmp_path / "uninterrupted")
    assert load_latest(tmp_path / "run/checkpoint.pth.tar")["clustered_epoch"] == 1
