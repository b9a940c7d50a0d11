"""SIGKILL at any instant of Contriever's training and of its preprocessing."""

import pytest

from tests.contriever.tiny import CONTRIEVER, make_data
from tests.reliability.runs import Run, assert_same_run, kill_at_random_instants, start_ranks


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    data = make_data(tmp_path_factory.mktemp("contriever"))
    return ("--train_data", data / "tokens", "--retriever_model_id", data / "encoder", "--total_steps", 12)


@pytest.mark.parametrize("kills", [10])
def test_runs_killed_at_random_instants_end_like_an_uninterrupted_one(kills, flags, tmp_path):
    Run(tmp_path / "uninterrupted", *flags, script=CONTRIEVER).assert_ends()
    for folder in kill_at_random_instants(tmp_path, kills, *flags, script=CONTRIEVER):
        assert_same_run(folder, tmp_path / "uninterrupted")


def test_two_ranks_killed_together_end_like_an_uninterrupted_pair(flags, tmp_path):
    flags = (*flags, "--per_gpu_batch_size", 2)
    for rank in start_ranks(tmp_path / "uninterrupted", 2, *flags, script=CONTRIEVER):
        rank.assert_ends()
    for step in (2, 5, 9):
        ranks = start_ranks(tmp_path / "run", 2, *flags, script=CONTRIEVER)
        ranks[0].wait_for_step(step)
        for rank in ranks:
            rank.kill()
    for rank in start_ranks(tmp_path / "run", 2, *flags, script=CONTRIEVER):
        rank.assert_ends()
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")
