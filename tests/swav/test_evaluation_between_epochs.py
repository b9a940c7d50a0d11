"""A signal during an evaluation between epochs saves at once, and the run ends like one that was never stopped."""

import os
import signal

import pytest

from shared.evaluation.knn_monitor import KNNMonitor
from tests.reliability.runs import assert_same
from tests.swav.training_runs import (
    comparable,
    lines,
    losses,
    state_of,
    train_deepclusterv2,
    train_swav,
    write_noise,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("images") / "noise")


@pytest.fixture(scope="module", params=[train_swav, train_deepclusterv2])
def uninterrupted(request, images, tmp_path_factory):
    """The script that trains, its flags, and the folder of a run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ("--data_path", images, "--val_path", images, "--eval_knn_freq", 2, "--epochs", 2)
    request.param(folder, *flags)
    return request.param, flags, folder


@pytest.mark.parametrize("which", [0, 1], ids=["before training", "after training"])
def test_a_signal_during_an_evaluation_saves_and_the_run_goes_on(uninterrupted, which, tmp_path, monkeypatch):
    train, flags, whole = uninterrupted
    run, calls = KNNMonitor.run, iter(range(2))

    def run_with_signal(monitor, backbone, between_batches):
        if next(calls) == which:
            os.kill(os.getpid(), signal.SIGTERM)
        return run(monitor, backbone, between_batches)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(KNNMonitor, "run", run_with_signal)
        train(tmp_path, *flags)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert len([line for line in lines(tmp_path) if "knn_top1" in line]) == which

    train(tmp_path, *flags)
    assert losses(tmp_path) == losses(whole)
    assert_same(*(comparable(state_of(folder)) for folder in (tmp_path, whole)), "checkpoint")
    assert (tmp_path / "log.txt").read_text() == (whole / "log.txt").read_text()
