"""SIGKILL at any instant of ResMLP's trainings, of images and of translation: everything comes back bit for bit."""

import random
import time

import pytest

from tests.reliability.runs import Run, Script, assert_same_run, start_ranks
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


@SCRIPTS
def test_runs_killed_at_random_instants_end_like_an_uninterrupted_one(script, images, tmp_path):
    flags = flags_of(script, images)
    uninterrupted = tmp_path / "uninterrupted"
    Run(uninterrupted, *flags, script=script).assert_ends()
    rng = random.Random(0)
    for repetition in range(3):
        folder = tmp_path / str(repetition)
        for _ in range(4):
            run = Run(folder, *flags, script=script)
            run.wait_for(lambda folder=folder: (folder / "attempt.json").exists())
            time.sleep(rng.uniform(0, 2))
            run.kill()
        Run(folder, *flags, script=script).assert_ends()
        assert_same_run(folder, uninterrupted)


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
