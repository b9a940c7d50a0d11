"""SIGKILL at any instant of Contriever's training and of its preprocessing."""

import random
import time

import pytest

from tests.contriever.training_runs import TINY, make_data
from tests.reliability.runs import Run, Script, assert_same_run, start_ranks

CONTRIEVER = Script("contriever.train", tuple(TINY))


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    data = make_data(tmp_path_factory.mktemp("contriever"))
    return ("--train_data", data / "tokens", "--retriever_model_id", data / "encoder", "--total_steps", 12)


@pytest.mark.parametrize("kills", [10])
def test_runs_killed_at_random_instants_end_like_an_uninterrupted_one(kills, flags, tmp_path):
    Run(tmp_path / "uninterrupted", *flags, script=CONTRIEVER).assert_ends()
    rng = random.Random(kills)
    killed, finished = 0, 0
    while killed < kills:
        folder = tmp_path / str(finished)
        while True:
            run = Run(folder, *flags, "--num_workers", killed % 3, script=CONTRIEVER)
            if killed < kills:
                run.wait_for(lambda folder=folder: (folder / "attempt.json").exists())
                time.sleep(rng.uniform(0, 2))
                run.kill()
            if run.exit_code() == 0:
                break
            assert run.exit_code() == -9, run.output()
            killed += 1
        finished += 1
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
