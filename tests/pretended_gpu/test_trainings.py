"""Every training script on the pretended GPU: it comes to its end, learns what it learns on a CPU, and does not wait.

What several processes share (``Training.pair``) is left out: DistributedDataParallel, FSDP and a mesh of devices take
no pretended tensors.
"""

import functools
import importlib
import math
import signal
from pathlib import Path

import pytest
import torch

from shared.run.checkpoint import load_latest, tensors_in
from tests.pretended_gpu.device import Wait, pretend, read_waits
from tests.reliability import faults
from tests.reliability.runs import Run, assert_same_run, checkpoints, log_lines
from tests.tiny_training import Training, trainings

TRAININGS = {
    name: training
    for name, training in trainings().items()
    if training.flags not in [other.flags for other in trainings().values()][: list(trainings()).index(name)]
}
EVERY_TRAINING = pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
MAY_WAIT = {  # functions within steps
    "shared/run/run.py:save": "a checkpoint that a script writes in the middle of an epoch",
    "shared/run/not_finite.py:is_good": "asked before such a save",
    "contriever/training/evaluation.py:run": "an evaluation after so many steps",
    "shared/run/estimate.py:final_bytes": "once, in the first step: how large the checkpoint will be",
}


def start(output_dir: Path, training: Training, places, *flags, steps: int | None = None, gpu: bool = True) -> Run:
    """A run on the pretended GPU, or on the CPU, that is asked to stop in its step of this number."""
    disturbances = [functools.partial(pretend, waits_file(output_dir))] if gpu else []
    if steps is not None:
        disturbances.append(functools.partial(faults.in_step, steps, functools.partial(faults.send, signal.SIGTERM)))
    return Run(
        output_dir,
        *training.data_flags(places),
        *flags,
        *("--device", "cuda" if gpu else "cpu"),
        script=training,
        fault=functools.partial(faults.together, *disturbances),
    )


def waits_file(output_dir: Path) -> Path:
    return output_dir.with_suffix(".waits")


def losses(output_dir: Path) -> list[float]:
    return [line["loss"] for line in log_lines(output_dir) if "loss" in line]


def newest(output_dir: Path) -> dict:
    """The state that has been saved last, as a CPU reads it."""
    paths = [output_dir / name for name in checkpoints(output_dir)]
    return load_latest(max(paths, key=lambda path: path.stat().st_mtime))


def shapes(state: dict) -> dict[str, tuple]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors_in(state)}


def assert_no_wait(output_dir: Path) -> None:
    """Nothing is read from the GPU in a step, but where a line of the log is due."""
    found = [wait for wait in read_waits(waits_file(output_dir)) if not (wait.logs or is_allowed(wait))]
    assert not found, "\n".join(f"{wait.calls[0]} {wait.line} ({wait.operation})" for wait in found)


def is_allowed(wait: Wait) -> bool:
    return not MAY_WAIT.keys().isdisjoint(wait.calls)


@EVERY_TRAINING
def test_first_steps_are_those_of_a_cpu_and_wait_for_nothing(training, places, tmp_path):
    flags = ("--amp", "fp32", "--log_freq", 3, "--saveckp_steps", 0)
    flags += ("--num_workers", 1) if training.has_workers else ()
    for device in ("cpu", "gpu"):
        run = start(tmp_path / device, training, places, *flags, steps=4, gpu=device == "gpu")
        run.assert_ends(128 + signal.SIGTERM)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4) and losses(tmp_path / "gpu")
    assert_no_wait(tmp_path / "gpu")
    found, expected = newest(tmp_path / "gpu"), newest(tmp_path / "cpu")
    assert shapes(found) == shapes(expected) and found["args"]["device"] == "cuda"
    assert all(type(tensor) is torch.Tensor and tensor.device.type == "cpu" for _, tensor in tensors_in(found))


def evaluations(training: Training) -> tuple:
    """Flags for everything that a training does between and after its epochs."""
    known = importlib.import_module(training.module).get_args_parser()._option_string_actions
    wanted = {"--eval_knn_freq": 1, "--pictures": "on"}
    return tuple(word for flag, value in wanted.items() if flag in known for word in (flag, value))


@pytest.mark.slow
@EVERY_TRAINING
def test_a_stopped_run_with_evaluations_and_pictures_ends_like_an_undisturbed_one(training, places, tmp_path):
    flags = ("--amp", "fp32", "--log_freq", 5, "--saveckp_steps", 0, *evaluations(training))
    start(tmp_path / "cpu", training, places, *flags, gpu=False).assert_ends()
    start(tmp_path / "whole", training, places, *flags).assert_ends()
    start(tmp_path / "run", training, places, *flags, steps=3).assert_ends(128 + signal.SIGTERM)
    start(tmp_path / "run", training, places, *flags).assert_ends()
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-2)
    for folder in ("whole", "run"):
        assert_no_wait(tmp_path / folder)
    files = [{path.name for path in (tmp_path / folder).rglob("*.*")} for folder in ("whole", "cpu")]
    assert files[0] == files[1]


@pytest.mark.slow
@EVERY_TRAINING
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_begins_with_about_the_same_loss_and_waits_for_nothing(amp, training, places, tmp_path):
    stopped = 128 + signal.SIGTERM
    for name in ("fp32", amp):
        flags = ("--amp", name, "--log_freq", 1, "--saveckp_steps", 0)
        start(tmp_path / name, training, places, *flags, steps=2).assert_ends(stopped)
    found, expected = losses(tmp_path / amp), losses(tmp_path / "fp32")
    assert all(map(math.isfinite, found)) and found[0] == pytest.approx(expected[0], rel=0.2), (found, expected)
    flags = ("--amp", amp, "--log_freq", 3, "--saveckp_steps", 0)
    start(tmp_path / "run", training, places, *flags, steps=4).assert_ends(stopped)
    assert_no_wait(tmp_path / "run")


@pytest.mark.slow
@EVERY_TRAINING
def test_batches_in_pieces_wait_for_nothing_either(training, places, tmp_path):
    if "--accumulate" not in importlib.import_module(training.module).get_args_parser()._option_string_actions:
        pytest.skip("it has no --accumulate")
    flags = ("--amp", "bf16", "--log_freq", 3, "--saveckp_steps", 0, "--accumulate", 2)
    start(tmp_path / "run", training, places, *flags, steps=4).assert_ends(128 + signal.SIGTERM)
    assert_no_wait(tmp_path / "run")
