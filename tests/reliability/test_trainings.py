"""What every training script does alike, tried with each: go on after a kill, leave out NaN, know its data again.

Whatever it keeps comes back bit for bit, on one process and on two.
"""

import functools
import json
import shutil

import pytest
import torch

from shared.run.checkpoint import first_not_finite, load_latest
from tests.reliability import faults
from tests.reliability.runs import (
    ROOT,
    Run,
    assert_same_run,
    checkpoints,
    kill_at_random_instants,
    log_lines,
    start_ranks,
    write_images,
)
from tests.tiny_training import Training, trainings

TRAININGS = trainings()
SCRIPTS = {training.module: training for training in reversed(TRAININGS.values())}


@pytest.fixture(scope="module", params=SCRIPTS.values(), ids=SCRIPTS)
def training(request) -> Training:
    return request.param


@pytest.fixture(scope="module")
def whole(training, places, tmp_path_factory):
    """Output folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    Run(folder, *training.data_flags(places), script=training).assert_ends()
    return folder


def newest(folder):
    paths = (folder / name for name in checkpoints(folder) if name.name != "nonfinite.pth")
    return max(paths, key=lambda path: path.stat().st_mtime)


def test_a_killed_run_ends_like_an_undisturbed_one(training, whole, places, tmp_path):
    flags = training.data_flags(places)
    run = Run(tmp_path / "run", *flags, fault=functools.partial(faults.slow_steps, 0.05), script=training)
    run.wait_for_step(3)
    run.kill()
    assert log_lines(tmp_path / "run")[-1]["step"] < log_lines(whole)[-1]["step"]
    Run(tmp_path / "run", *flags, script=training).assert_ends()
    assert_same_run(tmp_path / "run", whole)


def test_gradients_that_stay_nan_end_the_run_at_its_last_good_checkpoint(training, whole, places, tmp_path):
    flags = training.data_flags(places)
    fault = functools.partial(faults.nan_in_loss, range(4, 1000))
    limit = ("--max_skipped_steps", 2, "--log_freq", 1)
    printed = Run(tmp_path / "run", *flags, *limit, fault=fault, script=training).assert_ends(3)
    assert "2 steps in a row, up to step 6, had gradients that are not finite" in printed and "Traceback" not in printed
    report = torch.load(tmp_path / "run/nonfinite.pth", weights_only=True)
    assert report["step"] == 5 and report["first_not_finite"] == "the loss"
    skipped = [line["skipped"] for line in log_lines(tmp_path / "run") if "skipped" in line]
    assert skipped == [0, 0, 0, 0, 1, 1]
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert first_not_finite(load_latest(newest(tmp_path / "run"))) is None


def test_other_data_are_refused_unless_they_are_wanted(training, whole, places, tmp_path):
    if "{images}" not in training.data:
        pytest.skip("other texts are tried in tests/contriever")
    others = write_images(tmp_path / "images", count=30)
    flags = training.data_flags(places | {"images": others})
    folder = shutil.copytree(whole, tmp_path / "run")
    printed = Run(folder, *flags, script=training).assert_ends(2)
    assert "other training images" in printed and "--on_changed_run continue" in printed.splitlines()[-1]


@pytest.mark.slow
def test_a_run_killed_at_random_instants_ends_like_an_undisturbed_one(training, whole, places, tmp_path):
    for folder in kill_at_random_instants(tmp_path, 20, *training.data_flags(places), script=training):
        assert_same_run(folder, whole)
    steps = [line["step"] for line in log_lines(whole) if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] >= 8


@pytest.mark.slow
@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
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
    state = load_latest(newest(tmp_path / "run"))
    assert state["world_size"] == 2
    if training.check_pair is not None:
        training.check_pair(state)


def test_every_folder_with_a_training_is_here():
    """Those whose main script makes a run, itself or by the shared supervised loop."""
    folders = {file.parent.name for file in ROOT.glob("*/main*.py")}
    assert {module.partition(".")[0] for module in SCRIPTS} >= folders
