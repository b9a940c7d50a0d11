"""SIGKILL of every method's training: whatever it keeps comes back bit for bit, on one process and on two."""

import pytest

from shared.run.checkpoint import load_latest
from tests.reliability.runs import Run, assert_same_run, checkpoints, kill_at_random_instants, log_lines, start_ranks
from tests.tiny_training import trainings

TRAININGS = trainings()
ONE_OF_A_SCRIPT = {training.module: training for training in reversed(TRAININGS.values())}
EVERY_TRAINING = pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)


@pytest.mark.parametrize("training", ONE_OF_A_SCRIPT.values(), ids=lambda training: training.module)
def test_runs_killed_at_random_instants_end_like_an_uninterrupted_one(training, places, tmp_path):
    flags, uninterrupted = training.data_flags(places), tmp_path / "uninterrupted"
    Run(uninterrupted, *flags, script=training).assert_ends()
    for folder in kill_at_random_instants(tmp_path, 20, *flags, script=training):
        assert_same_run(folder, uninterrupted)
    steps = [line["step"] for line in log_lines(uninterrupted) if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] >= 8


@EVERY_TRAINING
def test_two_ranks_killed_together_end_like_an_uninterrupted_pair(training, places, tmp_path):
    flags = (*training.data_flags(places), *training.pair)
    for rank in start_ranks(tmp_path / "uninterrupted", 2, *flags, script=training):
        rank.assert_ends()
    for step in (2, 4):
        ranks = start_ranks(tmp_path / "run", 2, *flags, script=training)
        ranks[0].wait_for_step(step)
        for rank in ranks:
            rank.kill()
    for rank in start_ranks(tmp_path / "run", 2, *flags, script=training):
        rank.assert_ends()
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")
    newest = max(checkpoints(tmp_path / "run"), key=lambda name: (tmp_path / "run" / name).stat().st_mtime)
    state = load_latest(tmp_path / "run" / newest)
    assert state["world_size"] == 2
    if training.check_pair is not None:
        training.check_pair(state)


def test_every_folder_with_a_training_is_here():
    assert {training.module.partition(".")[0] for training in TRAININGS.values()} >= {
        "contriever",
        "deepcluster",
        "dino",
        "msn",
        "paws",
        "resmlp",
        "swav",
        "xcit",
    }
