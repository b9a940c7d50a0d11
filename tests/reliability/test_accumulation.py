"""``--accumulate`` in whole trainings: a batch in pieces gives the updates of the batch."""

import functools
import importlib

import pytest

from tests.reliability import faults
from tests.reliability.runs import Run, assert_same_run, log_lines, start_ranks
from tests.tiny_training import trainings

SCRIPTS = {training.module: training for training in reversed(trainings().values())}
CUT = {  # flags without which the pieces of a batch draw other random numbers
    "dino.main_dino": ("--drop_path_rate", 0),
    "msn.main": ("--patch_drop", 0, "--drop_path_rate", 0),
    "resmlp.main": ("--drop-path", 0, "--mixup", 0, "--cutmix", 0),
    "flexivit.main": (),
    "contriever.train": ("--dropout", 0),
}
WITHOUT = ("navit.main", "vit22b.main", "resmlp.translation.main")  # packed sequences, a mesh of devices, tokens


def losses(folder) -> list[float]:
    return [line["loss"] for line in log_lines(folder) if "loss" in line]


@pytest.mark.parametrize("name", CUT)
def test_a_run_in_pieces_has_the_losses_of_one_in_whole_batches(name, places, tmp_path):
    training = SCRIPTS[name]
    flags = (*training.data_flags(places), *CUT[name], "--amp", "fp32", "--log_freq", 1)
    Run(tmp_path / "whole", *flags, script=training).assert_ends()
    Run(tmp_path / "cut", *flags, "--accumulate", 2, script=training).assert_ends()
    assert len(set(losses(tmp_path / "whole"))) > 3
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_two_processes_in_pieces_have_the_losses_of_one_in_whole_batches(places, tmp_path):
    training = SCRIPTS["dino.main_dino"]
    flags = (*training.data_flags(places), "--drop_path_rate", 0, "--amp", "fp32", "--log_freq", 1)
    Run(tmp_path / "whole", *flags, script=training).assert_ends()
    for rank in start_ranks(tmp_path / "cut", 2, *flags, *training.pair, "--accumulate", 2, script=training):
        rank.assert_ends()
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_a_killed_run_in_pieces_ends_like_an_undisturbed_one(places, tmp_path):
    training = SCRIPTS["dino.main_dino"]
    flags = (*training.data_flags(places), "--accumulate", 2)  # with stochastic depth, drawn anew for every piece
    Run(tmp_path / "whole", *flags, script=training).assert_ends()
    run = Run(tmp_path / "run", *flags, fault=functools.partial(faults.slow_steps, 0.05), script=training)
    run.wait_for_step(3)
    run.kill()
    Run(tmp_path / "run", *flags, script=training).assert_ends()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("name", ["swav.main_swav", "swav.main_deepclusterv2", "deepcluster.main", "xcit.main"])
def test_a_backbone_with_batch_norms_says_what_differs(name, places, tmp_path):
    training = SCRIPTS[name]
    printed = Run(tmp_path / "run", *training.data_flags(places), "--accumulate", 2, script=training).assert_ends()
    assert "--accumulate 2: batch norms of the backbone normalise each piece by itself" in printed


def test_every_other_script_has_the_flag():
    for name in SCRIPTS:
        parser = importlib.import_module(name).get_args_parser()
        assert ("--accumulate" in parser._option_string_actions) == (name not in WITHOUT), name
