"""SIGTERM, SIGINT, SIGUSR1 and SIGUSR2: the step is finished, the state saved, the exit code is 128 + n."""

import functools
import signal

import pytest

from shared.run.checkpoint import load_latest
from tests.reliability import faults
from tests.reliability.runs import Run, assert_same_run, start_ranks


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        (signal.SIGTERM, 0),
        (signal.SIGUSR2, 2),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_the_state_and_ends_with_128_and_its_number(number, workers, images, uninterrupted, tmp_path):
    flags = ("--data_path", images, "--num_workers", workers, "--saveckp_steps", 0)
    run = Run(tmp_path / "run", *flags, fault=functools.partial(faults.slow_steps, 0.1))
    run.wait_for_step(4)
    run.signal(number)
    printed = run.assert_ends(128 + number)
    assert f"{number.name}: finishing this step, then saving" in printed and "Traceback" not in printed
    assert load_latest(tmp_path / "run/checkpoint.pth")["step_in_epoch"] >= 4  # nothing but the signal has saved it
    Run(tmp_path / "run", *flags, "--saveckp_steps", 1).assert_ends()
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGUSR2, signal.SIGTERM),
        *(pytest.param((n, n), marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)),
    ],
)
def test_two_signals_during_a_save_damage_nothing(numbers, images, uninterrupted, tmp_path):
    run = Run(tmp_path / "run", "--data_path", images, fault=functools.partial(faults.signals_during_save, 4, *numbers))
    printed = run.assert_ends(128 + numbers[0])
    assert "Traceback" not in printed
    # a second Ctrl-C does not wait for the save; the others do
    saved = load_latest(tmp_path / "run/checkpoint.pth")["step_in_epoch"]
    assert saved == (3 if numbers == (signal.SIGINT, signal.SIGINT) else 5)
    assert {path.name for path in (tmp_path / "run").glob(".*")} <= {".attempt"}
    Run(tmp_path / "run", "--data_path", images).assert_ends()
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_signal_to_one_of_two_ranks_stops_and_saves_both(images, tmp_path):
    ranks = start_ranks(tmp_path / "run", 2, "--data_path", images, fault=functools.partial(faults.slow_steps, 0.1))
    ranks[1].wait_for_step(2)
    ranks[1].signal(signal.SIGUSR1)
    for rank in ranks:
        rank.assert_ends(128 + signal.SIGUSR1)
    assert load_latest(tmp_path / "run/checkpoint.pth")["step_in_epoch"] >= 2


@pytest.fixture(scope="module")
def evaluated(images, tmp_path_factory):
    """An uninterrupted run with k-NN evaluations before training and after each epoch."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    Run(folder, "--data_path", images, "--eval_knn_freq", 1).assert_ends()
    return folder


@pytest.mark.parametrize(
    ("evaluation", "position"),
    [(2, (0, 6)), *(pytest.param(n, at, marks=pytest.mark.slow) for n, at in ((1, (0, 0)), (3, (1, 6))))],
)
def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(evaluation, position, images, evaluated, tmp_path):
    flags = ("--data_path", images, "--eval_knn_freq", 1)
    fault = functools.partial(faults.signal_in_evaluation, evaluation, signal.SIGUSR2)
    printed = Run(tmp_path / "run", *flags, fault=fault).assert_ends(128 + signal.SIGUSR2)
    assert printed.count("  knn_top1") == evaluation - 1
    saved = load_latest(tmp_path / "run/checkpoint.pth")
    assert (saved["epoch"], saved["step_in_epoch"]) == position
    Run(tmp_path / "run", *flags).assert_ends()
    assert_same_run(tmp_path / "run", evaluated)
