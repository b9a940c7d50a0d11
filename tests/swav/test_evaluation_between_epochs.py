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


@pytest.mark.parametrize("which", [0, 1], ids=["before training", "after training"])
@pytest.mark.parametrize("train", [train_swav, train_deepclusterv2])
def test_a_signal_during_an_evaluation_saves_and_the_run_goes_on(train, which, tmp_path, monkeypatch):
    images = write_noise(tmp_path / "noise")
    flags = ("--data_path", images, "--val_path", images, "--eval_knn_freq", 2, "--epochs", 2)
    train(tmp_path / "whole", *flags)

    run, calls = KNNMonitor.run, iter(range(2))

    def run_with_signal(monitor, backbone, between_batches):
        if next(calls) == which:
            os.kill(os.getpid(), signal.SIGTERM)
        return run(monitor, backbone, between_batches)

    monkeypatch.setattr(KNNMonitor, "run", run_with_signal)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "stopped", *flags)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert len([line for line in lines(tmp_path / "stopped") if "knn_top1" in line]) == which
    monkeypatch.undo()

    train(tmp_path / "stopped", *flags)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert_same(*(comparable(state_of(tmp_path / name)) for name in ("stopped", "whole")), "checkpoint")
    assert (tmp_path / "stopped/log.txt").read_text() == (tmp_path / "whole/log.txt").read_text()
