"""SIGKILL at any instant of SwAV and DeepCluster-v2: queue, memory and clusters come back bit for bit."""

import pytest

from shared.run.checkpoint import load_latest
from tests.reliability.runs import (
    DEEPCLUSTERV2,
    SWAV,
    Run,
    assert_same_run,
    kill_at_random_instants,
    log_lines,
    start_ranks,
)

SCRIPTS = pytest.mark.parametrize("script", [SWAV, DEEPCLUSTERV2], ids=["swav", "deepclusterv2"])


@SCRIPTS
@pytest.mark.parametrize("kills", [3, 20])
def test_runs_killed_at_random_instants_end_like_an_uninterrupted_one(script, kills, images, tmp_path):
    uninterrupted = tmp_path / "uninterrupted"
    Run(uninterrupted, "--data_path", images, script=script).assert_ends()
    for folder in kill_at_random_instants(tmp_path, kills, "--data_path", images, script=script):
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
