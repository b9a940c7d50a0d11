"""SIGKILL at any instant of ResMLP's trainings, of images and of translation: everything comes back bit for bit."""

import pytest

from tests.reliability.runs import Run, Script, assert_same_run, kill_at_random_instants, start_ranks
from tests.resmlp.training_runs import TINY


def few_sentences() -> None:
    """Give translation/main.py 60 pairs of sentences."""
    from resmlp.translation import main

    main.GENERATED_PAIRS = {"train": 60, "valid": 4, "test": 2}


SUPERVISED = Script("resmlp.main", (*TINY, *"--batch-size 4 --epochs 2 --drop-path 0.2 --saveckp_steps 1".split()))
TRANSLATION = Script(
    "resmlp.translation.main",
    tuple(
        "--vocabulary_size 100 --dim 8 --hidden_dim 16 --depth 1 --heads 2 --epochs 2 --max_tokens 128 --dropout 0.1 "
        "--log_freq 1 --device cpu --beam 2 --saveckp_steps 1".split()
    ),
    few_sentences,
)
SCRIPTS = pytest.mark.parametrize("script", [SUPERVISED, TRANSLATION], ids=["supervised", "translation"])


def flags_of(script: Script, images) -> tuple:
    return ("--data_path", images) if script is SUPERVISED else ()


def test_trainings_killed_at_random_instants_end_like_an_uninterrupted_one(images, tmp_path):
    uninterrupted = tmp_path / "uninterrupted"
    Run(uninterrupted, "--data_path", images, script=SUPERVISED).assert_ends()
    for folder in kill_at_random_instants(tmp_path, 10, "--data_path", images, script=SUPERVISED):
        assert_same_run(folder, uninterrupted)


def test_translations_killed_at_every_second_step_end_like_an_uninterrupted_one(tmp_path):
    Run(tmp_path / "uninterrupted", script=TRANSLATION).assert_ends()
    for step in (1, 3, 5, 7, 9, 11):
        run = Run(tmp_path / "run", script=TRANSLATION)
        run.wait_for_step(step)
        run.kill()
    Run(tmp_path / "run", script=TRANSLATION).assert_ends()
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")


@SCRIPTS
def test_two_ranks_killed_together_end_like_an_uninterrupted_pair(script, images, tmp_path):
    flags = flags_of(script, images)
    for rank in start_ranks(tmp_path / "uninterrupted", 2, *flags, script=script):
        rank.assert_ends()
    for step in (1, 3):
        ranks = start_ranks(tmp_path / "run", 2, *flags, script=script)
        ranks[0].wait_for_step(step)
        for rank in ranks:
            rank.kill()
    for rank in start_ranks(tmp_path / "run", 2, *flags, script=script):
        rank.assert_ends()
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")
