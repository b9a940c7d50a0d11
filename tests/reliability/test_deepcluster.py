"""SIGKILL at any instant of DeepCluster: clusters, top layer and momentum come back bit for bit."""

import pytest

from shared.run.checkpoint import load_latest
from tests.reliability.runs import (
    DEEPCLUSTER,
    Run,
    assert_same_run,
    kill_at_random_instants,
    log_lines,
    start_ranks,
)


def assert_same_end(one, other):
    assert_same_run(one, other)
    assert (one / "clusters.csv").read_text() == (other / "clusters.csv").read_text()


@pytest.mark.parametrize("kills", [3, 20])
def test_runs_killed_at_random_instants_end_like_an_uninterrupted_one(kills, images, tmp_path):
    uninterrupted = tmp_path / "uninterrupted"
    Run(uninterrupted, images, script=DEEPCLUSTER).assert_ends()
    for folder in kill_at_random_instants(tmp_path, kills, images, script=DEEPCLUSTER):
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
