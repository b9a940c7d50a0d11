"""SIGKILL at any instant: the same command goes on by itself and ends like a run that was never killed."""

import functools

import pytest

from shared.run.checkpoint import load_latest
from tests.reliability import faults
from tests.reliability.runs import Run, assert_same_run, kill_at_random_instants, log_lines


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_runs_killed_at_random_instants_end_like_an_uninterrupted_one(kills, images, uninterrupted, tmp_path):
    for folder in kill_at_random_instants(tmp_path, kills, "--data_path", images, within_s=1.5):
        assert_same_run(folder, uninterrupted)
        assert [line["step"] for line in log_lines(folder)] == [2, 4, 6, 8, 10, 12]


def test_a_killed_run_goes_on_with_its_scale_of_the_loss(images, tmp_path):
    scaled = functools.partial(faults.scale_loss_on_cpu, 2)  # doubled after two good steps, halved after a bad one
    spoilt = functools.partial(faults.together, scaled, functools.partial(faults.nan_in_loss, {3}))
    slow = functools.partial(faults.together, spoilt, functools.partial(faults.slow_steps, 0.1))
    Run(tmp_path / "whole", "--data_path", images, fault=spoilt).assert_ends()
    killed = Run(tmp_path / "killed", "--data_path", images, fault=slow)
    killed.wait_for_step(6)
    killed.kill()
    scale = load_latest(tmp_path / "killed/checkpoint.pth")["fp16_scaler"]["scale"]
    Run(tmp_path / "killed", "--data_path", images, fault=spoilt).assert_ends()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert load_latest(tmp_path / "whole/checkpoint.pth")["fp16_scaler"]["scale"] > scale
