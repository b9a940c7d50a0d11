import argparse
import errno
import math
import os
import random
import signal
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shared import distributed
from shared.run import checkpoint
from shared.run.attempt import NotFinite
from shared.run.checkpoint import Checkpointer, CheckpointError, Interrupted
from tests.processes import run_processes


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


@pytest.mark.parametrize("content", [b"", b"something else"])
def test_a_damaged_newest_file_falls_back_loudly(content, tmp_path, capsys):
    path = tmp_path / "checkpoint.pth"
    write(path, 1)
    write(path, 2)
    path.unlink()  # the previous file shares no disk blocks with it, but be sure
    path.write_bytes(content)
    assert value_of(checkpoint.load_latest(path)) == 1
    printed = capsys.readouterr().out
    assert "WARNING" in printed and "previous" in printed and str(path) in printed


def test_any_damage_to_the_newest_file_is_harmless_or_found(tmp_path):
    path = tmp_path / "checkpoint.pth"
    for value in (1, 2):
        checkpoint.save(path, {"weight": torch.full((20,), float(value)), "value": value})
    content = path.read_bytes()
    rng = random.Random(0)
    damaged = [content[:length] for length in rng.sample(range(len(content)), 100)]
    for position in rng.sample(range(len(content)), 300):
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    found = {1: 0, 2: 0}
    for newest in damaged:
        path.write_bytes(newest)
        state = checkpoint.load_latest(path)
        assert torch.equal(state["weight"], torch.full((20,), float(state["value"])))
        found[state["value"]] += 1
    assert found[1] > 200  # the rest are names and dates of records that nobody reads


def test_a_compressed_record_is_no_checkpoint(tmp_path):
    """torch never compresses, so nothing has to be inflated: no decompression bombs."""
    with zipfile.ZipFile(tmp_path / "checkpoint.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1000))
    with pytest.raises(CheckpointError, match="a compressed record"):
        checkpoint.verify(tmp_path / "checkpoint.pth")


def test_a_damaged_newest_file_never_replaces_the_intact_previous_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    write(path, 1)
    write(path, 2)
    path.unlink()
    path.write_bytes(b"torn")
    checkpoint.load_latest(path)
    assert (tmp_path / "checkpoint.pth.damaged").read_bytes() == b"torn"

    def no_replace(source, target):
        if target == path:
            raise OSError(5, "Input/output error")
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", no_replace)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write(path, 3)
    assert value_of(checkpoint.load_latest(path)) == 1


def test_a_newest_file_that_was_removed_is_reported_too(tmp_path, capsys):
    path = tmp_path / "checkpoint.pth"
    write(path, 1)
    write(path, 2)
    path.unlink()
    assert value_of(checkpoint.load_latest(path)) == 1
    assert f"WARNING: {path} is missing, falling back to the previous checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("function", ["verify", "safe_load"])
def test_a_file_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch, function):
    path = tmp_path / "checkpoint.pth"
    for value in (1, 2):
        write(path, value)

    def fail(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    if function == "verify":
        monkeypatch.setattr(zipfile.ZipFile, "testzip", fail)
    else:
        monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(OSError, match=r"Stale file handle") as refusal:
        checkpoint.load_latest(path)
    assert str(path) in str(refusal.value) and not isinstance(refusal.value, CheckpointError)
    monkeypatch.undo()
    assert value_of(checkpoint.load_latest(path)) == 2


def test_a_table_that_leads_beyond_every_file_is_damage(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    write(path, 1)
    write(path, 2)
    testzip = zipfile.ZipFile.testzip

    def seek_too_far(archive):
        if archive.filename == str(path):
            raise OSError(errno.EINVAL, "Invalid argument")
        return testzip(archive)

    monkeypatch.setattr(zipfile.ZipFile, "testzip", seek_too_far)
    assert value_of(checkpoint.load_latest(path)) == 1


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


def test_the_disk_has_the_data_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    write(path, 1)
    events = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_replace(source, target):
        events.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write(path, 2)
    (first, temporary), *_, (before_last, new_name), (last, folder) = events
    assert (first, before_last, last) == ("fsync", "replace", "fsync")
    assert ".checkpoint.pth." in temporary
    assert (new_name, folder) == (str(path), str(tmp_path))


def test_without_hard_links_the_old_file_and_the_second_name_are_copies(tmp_path, monkeypatch):
    def no_link(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_link)
    path = tmp_path / "checkpoint.pth"
    write(path, 1)
    checkpoint.save(path, {"weight": torch.full((1000,), 2.0)}, keep_as="checkpoint0000.pth")
    values = [value_of(checkpoint.load_latest(p)) for p in (path, checkpoint.previous(path))]
    assert values == [2, 1]
    assert value_of(checkpoint.load_latest(tmp_path / "checkpoint0000.pth")) == 2
    assert len(list(tmp_path.iterdir())) == 3


def test_the_second_name_may_be_in_a_folder_below(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoint.pth.tar"
    for value, name in ((1, "checkpoints/ckp-0.pth"), (2, None)):
        checkpoint.save(path, {"weight": torch.full((1000,), float(value))}, keep_as=name)
    assert value_of(checkpoint.load_latest(path)) == 2
    assert value_of(checkpoint.load_latest(tmp_path / "checkpoints/ckp-0.pth")) == 1
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["ckp-0.pth"]


def test_leftovers_of_killed_processes_are_removed_when_the_run_goes_on(tmp_path):
    path = tmp_path / "checkpoint.pth"
    write(path, 1)
    for name in (".checkpoint.pth.host-123", ".checkpoint.pth.link"):
        (tmp_path / name).write_bytes(b"half a checkpoint")
    Checkpointer(path, lambda epoch, step: {})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_never_reach_the_disk(tmp_path, bad, dtype):
    path = tmp_path / "checkpoint.pth"
    write(path, 1)
    weight = torch.zeros(3, 4, dtype=dtype)
    weight[2, 1] = bad
    state = {"counts": torch.ones(2, dtype=torch.int64), "empty": torch.zeros(0), "moments": [torch.ones(2), weight]}
    with pytest.raises(NotFinite, match=r"moments\.1 is not finite; the checkpoint before it stays"):
        checkpoint.save(path, state)
    assert value_of(checkpoint.load_latest(path)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def look_into_own_folder(rank, folder):
    """Rank 1 sees another file system than rank 0."""
    try:
        checkpoint.load_latest(os.path.join(folder, str(rank), "checkpoint.pth"))
    except ValueError as error:
        return str(error)


def test_processes_that_find_different_checkpoints_say_so(tmp_path):
    (tmp_path / "0").mkdir()
    write(tmp_path / "0" / "checkpoint.pth", 1)
    for message in run_processes(look_into_own_folder, 2, str(tmp_path)):
        assert "the newest checkpoint in" in message and "differs between processes" in message
        assert "rank 1 has None" in message


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


def end_with_a_signal_in_the_last_save(rank, folder):
    def state(epoch, step):
        if distributed.get_rank() == distributed.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR2)  # the request of this save has been read
        return {"epoch": epoch}

    try:
        with Checkpointer(Path(folder) / "checkpoint.pth", state) as checkpointer:
            checkpointer.after_epoch(0)
    except Interrupted as stop:
        return int(stop.signal_number)


def test_a_signal_during_the_last_save_is_not_lost(tmp_path):
    assert end_with_a_signal_in_the_last_save(0, tmp_path) == signal.SIGUSR2
    assert checkpoint.load_latest(tmp_path / "checkpoint.pth") == {"epoch": 1}
    assert run_processes(end_with_a_signal_in_the_last_save, 2, tmp_path) == [signal.SIGUSR2] * 2


def test_a_run_in_a_thread_goes_without_signals_and_says_so(tmp_path, capsys):
    path = tmp_path / "checkpoint.pth"

    def train():
        with Checkpointer(path, lambda epoch, step: {"epoch": epoch}) as checkpointer:
            checkpointer.after_epoch(0)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert checkpoint.load_latest(path) == {"epoch": 1}
    assert "WARNING: a run in a thread hears no signals" in capsys.readouterr().out


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


def test_a_run_in_doubt_keeps_its_last_good_checkpoint_until_it_is_stopped(tmp_path):
    path = tmp_path / "checkpoint.pth"
    good = True
    checkpointer = Checkpointer(path, lambda epoch, step: {"step": step}, every_steps=1, is_good=lambda: good)
    checkpointer.after_step(0, 1)
    good = False
    checkpointer.after_step(0, 2)
    assert checkpoint.load_latest(path) == {"step": 1}
    checkpointer.received = signal.SIGTERM
    with pytest.raises(Interrupted):
        checkpointer.after_step(0, 3)
    assert checkpoint.load_latest(path) == {"step": 3}


def test_a_signal_during_other_work_saves_the_state_before_it_and_stops(tmp_path):
    path = tmp_path / "checkpoint.pth"
    with pytest.raises(Interrupted) as stop:
        with Checkpointer(path, lambda epoch, step: {"epoch": epoch, "step": step}, every_steps=1) as checkpointer:
            checkpointer.stop_if_asked(2, 5)
            assert not path.exists()  # nobody has asked
            os.kill(os.getpid(), signal.SIGTERM)
            checkpointer.stop_if_asked(2, 5)
    assert stop.value.signal_number == signal.SIGTERM
    assert checkpoint.load_latest(path) == {"epoch": 2, "step": 5}


def test_saves_when_so_many_minutes_have_passed_since_the_last_save(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now))
    saved = []

    def state(epoch, step):
        saved.append((step, now))
        return {}

    checkpointer = Checkpointer(tmp_path / "checkpoint.pth", state, every_minutes=2)
    for step in range(1, 20):
        now += 50
        checkpointer.after_step(0, step)
    assert [now - before for (_, before), (_, now) in zip([(0, 1000), *saved], saved, strict=False)] == [150] * 6


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


def test_of_short_epochs_one_a_minute_is_saved_and_the_last_one(tmp_path, monkeypatch):
    now, saved = 0.0, []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    monkeypatch.setattr(checkpoint, "save", lambda path, state, keep_as: saved.append(state["epoch"]))
    checkpointer = Checkpointer(tmp_path / "checkpoint.pth", lambda epoch, step: {"epoch": epoch})
    for epoch in range(12):
        now += 25
        checkpointer.after_epoch(epoch, "numbered.pth" if epoch == 3 else None, is_last=epoch == 11)
    assert saved == [3, 4, 7, 10, 12]  # 75 s, numbered, 75 s, 75 s, the last one


# -- going on from a checkpoint


def network():
    return torch.nn.Linear(2, 3)


def test_restore_fills_every_part_and_understands_the_prefix_of_distributed_runs():
    old, new = network(), network()
    optimizer = torch.optim.SGD(new.parameters(), lr=1.0)
    entry = {f"module.{name}": value for name, value in old.state_dict().items()}
    saved = torch.optim.SGD(old.parameters(), lr=0.5).state_dict()
    checkpoint.restore({"student": entry, "optimizer": saved, "epoch": 3}, student=new, optimizer=optimizer)
    assert torch.equal(new.weight, old.weight) and optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"epoch": 1, "teacher": {}}, "it has no student: epoch, teacher"),
        ({"student": torch.nn.Linear(2, 4).state_dict()}, "student does not fit this run: .*size mismatch for weight"),
        ({"student": {"weight": torch.zeros(3, 2)}}, r"student does not fit this run: .*Missing key.* \"bias\""),
        ({"student": network().state_dict(), "optimizer": {"state": {}, "param_groups": []}}, "optimizer does not fit"),
    ],
)
def test_a_checkpoint_that_fits_in_part_is_refused(entries, message):
    part = network()
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(entries, student=part, optimizer=torch.optim.SGD(part.parameters(), lr=1.0))


def test_a_file_of_weights_is_not_taken_for_a_run():
    with pytest.raises(ValueError, match="--output_dir run is not that of a training run"):
        checkpoint.check_flags(network().state_dict(), argparse.Namespace(output_dir="run"), ())


def test_only_flags_are_told_of_a_changed_command(capsys):
    saved = {"epoch": 0, "args": {"lr": 0.1, "unset": {"epochs": 100}}}
    checkpoint.check_flags(saved, argparse.Namespace(output_dir="run", lr=0.2, unset={}), ())
    assert capsys.readouterr().out == "resuming with --lr 0.2, the checkpoint was written with 0.1\n"


@pytest.mark.parametrize(("old_world", "old_batch"), [(2, 8), (1, 4)])
def test_a_changed_world_or_batch_is_refused_or_stated_with_what_differs(old_world, old_batch, capsys):
    saved = {"epoch": 3, "step_in_epoch": 4, "batch_size": old_batch, "world_size": old_world, "images": 7}
    with pytest.raises(ValueError, match=f"--on_changed_run refuse: {old_batch} images per step on {old_world} proc"):
        checkpoint.resume_position(saved, 8, 7, "refuse")
    assert checkpoint.resume_position(saved, 8, 7, "same_data") == (3, 4 * old_batch // 8)
    printed = capsys.readouterr().out
    assert "resuming a changed run" in printed and "grouping into batches and random draws" in printed


def test_other_images_are_refused_unless_they_are_wanted(capsys):
    saved = {"epoch": 3, "step_in_epoch": 4, "batch_size": 8, "world_size": 1, "images": 7}
    for choice, message in (
        ("same_data", "or go on all the same with --on_changed_run continue"),
        ("refuse", "refuse: other"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.resume_position(saved, 8, 9, choice)
    assert checkpoint.resume_position(saved, 8, 9, "continue") == (3, 4)
    assert "other training images, or the same under other names" in capsys.readouterr().out


def test_an_unchanged_run_goes_on_without_a_word(capsys):
    saved = {"epoch": 3, "step_in_epoch": 4, "batch_size": 8, "world_size": 1, "images": 7}
    assert checkpoint.resume_position(saved, 8, 7, "refuse") == (3, 4)
    assert capsys.readouterr().out == ""
