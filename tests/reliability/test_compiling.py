"""``--compile`` in whole trainings: the updates are those of the code as it stands, whoever goes on with a run.

Code is compiled here for the folders that compile parts of their networks, for others by tests of their own; the code
of all is captured.
"""

import functools
import importlib

import pytest
import torch

from tests.reliability import faults
from tests.reliability.runs import Run, log_lines, start_ranks
from tests.tiny_training import trainings

TRAININGS = trainings()
SCRIPTS = {training.module: training for training in reversed(TRAININGS.values())}
WITHOUT = ("resmlp.translation.main",)
PARTS = ("contriever", "deepercluster", "navit", "seer", "vit22b")
LOG = ("--amp", "fp32", "--log_freq", 2)  # ViT-22B does not compile the steps that it logs


def without_rounding() -> None:
    """DeeperCluster without dropout, which compiled code draws otherwise, and in float64: batch norms of four images
    make other losses of rounding errors at once.
    """
    from deepercluster import main

    normalize_views = main.normalize_views
    torch.nn.Dropout.forward = lambda self, x: x
    torch.set_default_dtype(torch.double)
    main.normalize_views = lambda *views: [view.double() for view in normalize_views(*views)]


FAULTS = {"deepercluster": without_rounding}


def losses(folder) -> list[float]:
    return [line["loss"] for line in log_lines(folder) if "loss" in line]


def has_begun(folder) -> bool:
    return len(losses(folder)) > 2


def captured_only() -> None:
    """Code is captured as for a compiler, with its guards and versions, and run as it was captured."""
    torch.compile = functools.partial(torch.compile, backend="eager")


def test_every_other_script_has_the_flag():
    for name in SCRIPTS:
        parser = importlib.import_module(name).get_args_parser()
        assert ("--compile" in parser._option_string_actions) == (name not in WITHOUT), name


@pytest.mark.slow
@pytest.mark.parametrize("module", [name for name in SCRIPTS if name not in WITHOUT])
def test_captured_code_trains_alike(module, places, tmp_path):
    training = SCRIPTS[module]
    flags = (*training.data_flags(places), *training.exact, *LOG)
    for folder, fault, compiled in (("eager", None, ()), ("captured", captured_only, ("--compile",))):
        Run(tmp_path / folder, *flags, *compiled, fault=fault, script=training).assert_ends(timeout_s=300)
    assert losses(tmp_path / "captured") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_a_run_goes_on_with_and_without_compiled_code(name, places, tmp_path):
    training, exactly = TRAININGS[name], FAULTS.get(name, bool)
    flags = (*training.data_flags(places), *training.exact, *LOG)
    slowly = functools.partial(faults.together, exactly, functools.partial(faults.slow_steps, 0.05))
    Run(tmp_path / "eager", *flags, fault=exactly, script=training).assert_ends()
    for folder, before, after in (("first", ("--compile",), ()), ("then", (), ("--compile",))):
        run = Run(tmp_path / folder, *flags, *before, fault=slowly, script=training)
        run.wait_for(functools.partial(has_begun, tmp_path / folder), timeout_s=900)
        run.kill()
        Run(tmp_path / folder, *flags, *after, fault=exactly, script=training).assert_ends(timeout_s=900)
        assert losses(tmp_path / folder) == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
        logged = [line.keys() for line in log_lines(tmp_path / folder)]
        assert logged == [line.keys() for line in log_lines(tmp_path / "eager")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepercluster", "seer, sharded", "vit22b on a mesh"])
def test_two_processes_that_are_compiled_train_alike(name, places, tmp_path):
    training, exactly = TRAININGS[name], FAULTS.get(name)
    flags = (*training.data_flags(places), *training.pair, *LOG)
    for folder, compiled in (("eager", ()), ("compiled", ("--compile",))):
        for rank in start_ranks(tmp_path / folder, 2, *flags, *compiled, fault=exactly, script=training):
            rank.assert_ends(timeout_s=900)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
