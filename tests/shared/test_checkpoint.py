import os
import signal

import pytest
import torch

from shared import checkpoint
from shared.checkpoint import CheckpointError, Checkpointer, Interrupted


def write(path, value):
    checkpoint.save(path, {"weight": torch.full((1000,), float(value))})


def value_of(state):
    return state["weight"][0].item()


def test_a_save_keeps_the_file_it_replaces(tmp_path):
    path = tmp_path / "checkpoint.pth"
    for value in (1, 2, 3):
        write(path, value)
    assert value_of(checkpoint.load_latest(path)) == 3
    assert value_of(torch.load(checkpoint.previous(path), weights_only=True)) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pth", "checkpoint.pth.previous"]


def test_nothing_there_is_none(tmp_path):
    assert checkpoint.load_latest(tmp_path / "checkpoint.pth") is None


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "not a checkpoint"])
def test_a_damaged_newest_file_falls_back_loudly(tmp_path, capsys, damage):
    path = tmp_path / "checkpoint.pth"
    write(path, 1)
    write(path, 2)
    content = bytearray(path.read_bytes())
    if damage == "torn":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[content.index(torch.full((1000,), 2.0).numpy().tobytes()) + 40] ^= 1
    elif damage == "empty":
        content = b""
    else:
        content = b"something else"
    path.unlink()  # the previous file shares no disk blocks with it, but be sure
    path.write_bytes(content)
    assert value_of(checkpoint.load_latest(path)) == 1
    printed = capsys.readouterr().out
    assert "WARNING" in printed and "previous" in printed and str(path) in printed


def test_two_damaged_files_are_an_error_that_names_both(tmp_path):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(b"x")
    checkpoint.previous(path).write_bytes(b"y")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth .*checkpoint\.pth\.previous"):
        checkpoint.load_latest(path)


def test_a_full_disk_leaves_the_old_checkpoint_intact(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    write(path, 1)

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        write(path, 2)
    monkeypatch.undo()
    assert value_of(checkpoint.load_latest(path)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_a_deleted_folder_is_a_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="gone"):
        write(tmp_path / "gone" / "checkpoint.pth", 1)


def test_a_signal_saves_the_state_of_the_finished_step_and_stops(tmp_path):
    path = tmp_path / "checkpoint.pth"
    handler = signal.getsignal(signal.SIGUSR1)
    steps = []
    with pytest.raises(Interrupted) as stop:
        with Checkpointer(path, lambda epoch, step: {"epoch": epoch, "step": step}) as checkpointer:
            for step in range(10):
                if step == 3:
                    os.kill(os.getpid(), signal.SIGUSR1)
                steps.append(step)
                checkpointer.after_step(0, step + 1)
    assert steps == [0, 1, 2, 3]
    assert stop.value.code == 128 + signal.SIGUSR1
    assert checkpoint.load_latest(path) == {"epoch": 0, "step": 4}
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_a_second_interrupt_stops_at_once(tmp_path):
    with pytest.raises(Interrupted):
        with Checkpointer(tmp_path / "checkpoint.pth", lambda epoch, step: {}):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second signal did not stop the run")
    assert not list(tmp_path.iterdir())


def test_of_several_signals_the_one_that_requeues_a_job_counts(tmp_path):
    with pytest.raises(Interrupted) as stop:
        with Checkpointer(tmp_path / "checkpoint.pth", lambda epoch, step: {}) as checkpointer:
            for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):  # torchrun and SLURM repeat SIGTERM
                os.kill(os.getpid(), number)
            checkpointer.after_step(0, 1)
    assert stop.value.signal_number == signal.SIGUSR2
    assert (tmp_path / "checkpoint.pth").exists()


def test_saves_every_n_steps_and_at_the_end_of_an_epoch(tmp_path):
    path = tmp_path / "checkpoint.pth"
    saved = []

    def state(epoch, step):
        saved.append((epoch, step))
        return {"epoch": epoch, "step": step}

    checkpointer = Checkpointer(path, state, every_steps=2)
    for step in range(5):
        checkpointer.after_step(0, step + 1)
    checkpointer.after_epoch(0, keep_as="checkpoint0000.pth")
    assert saved == [(0, 2), (0, 4), (1, 0)]
    checkpointer.after_step(1, 2)  # replaces checkpoint.pth, not the numbered one
    assert checkpoint.load_latest(tmp_path / "checkpoint0000.pth") == {"epoch": 1, "step": 0}
