"""What every training script does alike, tried with each: go on after a kill, leave out NaN, know its data again."""

import functools
import json

import pytest
import torch

from shared.run.checkpoint import first_not_finite, load_latest
from tests.reliability import faults
from tests.reliability.runs import Run, assert_same_run, checkpoints, log_lines, write_images
from tests.tiny_training import Training, trainings

SCRIPTS = {training.module: training for training in reversed(trainings().values())}


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
    run = Run(tmp_path / "run", *flags, fault=functools.partial(faults.slow_saves, 0.05), script=training)
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


def test_other_data_are_refused_unless_they_are_wanted(training, whole, places, tmp_path, tmp_path_factory):
    if "{images}" not in training.data:
        pytest.skip("other texts are tried in tests/contriever")
    others = write_images(tmp_path / "images", count=30)
    flags = training.data_flags(places | {"images": others})
    printed = Run(whole, *flags, script=training).assert_ends(2)
    assert "other training images" in printed and "--on_changed_run continue" in printed.splitlines()[-1]
