"""Every training script on a GPU: what a CPU learns, in each precision, and bit by bit after a kill."""

import math
from pathlib import Path

import pytest
import torch

from shared.run.checkpoint import load_latest
from tests.reliability.runs import Run, assert_same_run, log_lines
from tests.tiny_training import trainings

TRAININGS = trainings()
EVERY_TRAINING = pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)


def losses(output_dir: Path) -> list[float]:
    return [line["loss"] for line in log_lines(output_dir) if "loss" in line]


@EVERY_TRAINING
def test_a_gpu_learns_what_a_cpu_learns(training, places, tmp_path):
    flags = (*training.data_flags(places), *training.exact, "--amp", "fp32", "--log_freq", 1)
    for device in ("cpu", "cuda"):
        Run(tmp_path / device, *flags, "--device", device, script=training).assert_ends()
    found, expected = losses(tmp_path / "cuda"), losses(tmp_path / "cpu")
    assert len(found) == len(expected) >= 4
    if training.rounding is not None:
        assert found[0] == pytest.approx(expected[0], rel=training.rounding), (found, expected)
        return
    # rounding grows from step to step; the first ones leave no room for another formula
    assert found[:3] == pytest.approx(expected[:3], rel=2e-3), (found, expected)
    assert found == pytest.approx(expected, rel=0.1)


@EVERY_TRAINING
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_learns_about_the_same(amp, training, places, tmp_path):
    flags = (*training.data_flags(places), *training.exact, "--log_freq", 1, "--device", "cuda")
    for precision in ("fp32", amp):
        Run(tmp_path / precision, *flags, "--amp", precision, script=training).assert_ends()
    found, expected = losses(tmp_path / amp), losses(tmp_path / "fp32")
    assert all(map(math.isfinite, found))
    assert found[0] == pytest.approx(expected[0], rel=0.15), (found, expected)


@EVERY_TRAINING
def test_a_killed_run_goes_on_bit_by_bit(training, places, tmp_path):
    flags = (*training.data_flags(places), "--device", "cuda", "--amp", "bf16", "--log_freq", 1)
    Run(tmp_path / "whole", *flags, script=training).assert_ends()
    for step in (2, 7):
        workers = ("--num_workers", step % 3) if training.has_workers else ()
        run = Run(tmp_path / "killed", *flags, *workers, script=training)
        run.wait_for_step(step)
        run.kill()
    Run(tmp_path / "killed", *flags, script=training).assert_ends()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_what_a_gpu_saves_a_cpu_reads(images, tmp_path):
    Run(tmp_path / "run", "--data_path", images, "--device", "cuda", "--epochs", 1).assert_ends()
    state = load_latest(tmp_path / "run/checkpoint.pth")
    assert all(value.device == torch.device("cpu") for value in state["student"].values())
    Run(tmp_path / "run", "--data_path", images, "--device", "cpu", "--epochs", 2).assert_ends()
