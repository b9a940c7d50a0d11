"""Disks, folders and files that fail under a run: a clear error, and the checkpoint before it is intact."""

import functools
import os
import re
import shutil
import subprocess

import pytest

from shared.run.checkpoint import load_latest
from tests.reliability import faults
from tests.reliability.runs import Run, assert_same_run, write_images


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"may not mount a file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("place", "fault", "reason"),
    [
        ("tmp_path", faults.limit_file_size, r"\[Errno 27\] File too large"),
        ("tmp_path", faults.make_read_only, r"\[Errno 13\] Permission denied"),
        ("small_disk", faults.fill_disk, ".*No space left on device"),
    ],
)
def test_a_save_that_fails_is_one_message_and_the_run_goes_on_later(
    place, fault, reason, images, uninterrupted, request
):
    folder = request.getfixturevalue(place) / "run"
    printed = Run(folder, "--data_path", images, fault=functools.partial(fault, folder, 4)).assert_ends(2)
    assert re.search(f"error: could not write {folder}/checkpoint.pth: {reason}.*before it is intact", printed)
    assert "Traceback" not in printed
    folder.chmod(0o755)
    (folder / "filler").unlink(missing_ok=True)
    assert load_latest(folder / "checkpoint.pth")["step_in_epoch"] == 3
    assert not [path for path in folder.glob(".*") if "checkpoint" in path.name]
    Run(folder, "--data_path", images).assert_ends()
    assert_same_run(folder, uninterrupted)


def test_a_folder_deleted_during_the_run_is_one_message_that_names_it(images, tmp_path):
    folder = tmp_path / "run"
    run = Run(folder, "--data_path", images, fault=functools.partial(faults.remove_folder, folder, 3))
    printed = run.assert_ends(2)
    assert re.search(f"error: .*{folder}", printed) and "Traceback" not in printed


def test_a_full_disk_under_the_log_is_one_message_that_names_the_file(images, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    os.symlink("/dev/full", folder / "metrics.jsonl")
    printed = Run(folder, "--data_path", images, "--saveckp_steps", 0).assert_ends(2)
    assert f"error: --output_dir {folder}: No space left on device: {folder}/metrics.jsonl" in printed
    assert "Traceback" not in printed


def test_an_output_folder_that_cannot_be_made_is_one_message_that_names_it(images, tmp_path):
    (tmp_path / "file").write_text("")
    run = Run(tmp_path / "file", "--data_path", images, "--output_dir", tmp_path / "file" / "run")
    printed = run.assert_ends(2)
    assert f"error: --output_dir {tmp_path}/file/run: Not a directory: {tmp_path}/file/run" in printed
    assert "Traceback" not in printed


def test_an_image_that_vanishes_after_listing_is_replaced_and_listed(tmp_path):
    images = write_images(tmp_path / "images")
    vanishing = images / "class1" / "4.png"
    flags = ("--data_path", images, "--max_bad_fraction", 0.05)
    fault = functools.partial(faults.remove_after_listing, vanishing)
    content = vanishing.read_bytes()
    for workers in (0, 2):
        vanishing.write_bytes(content)
        Run(tmp_path / f"run{workers}", *flags, "--num_workers", workers, fault=fault).assert_ends()
        listed = (tmp_path / f"run{workers}" / "bad_images.txt").read_text().splitlines()
        assert [line.split("\t")[0] for line in listed] == [str(vanishing)]
    assert_same_run(tmp_path / "run0", tmp_path / "run2")


def test_a_killed_loader_process_is_one_message_that_names_it_and_the_run_goes_on_later(
    images, uninterrupted, tmp_path
):
    flags = ("--data_path", images, "--num_workers", 2)
    printed = Run(tmp_path / "run", *flags, fault=functools.partial(faults.kill_worker, 1)).assert_ends(4)
    assert re.search(r"error: DataLoader worker \(pid\(?s?\)? ?\d+\).*(SIGKILL|Killed)", printed), printed
    assert "Traceback" not in printed
    Run(tmp_path / "run", *flags).assert_ends()
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_run_whose_newest_checkpoint_is_torn_goes_on_from_the_one_before(images, uninterrupted, tmp_path):
    run = Run(tmp_path / "run", "--data_path", images, fault=functools.partial(faults.slow_steps, 0.1))
    run.wait_for_step(4)
    run.kill()
    newest = tmp_path / "run" / "checkpoint.pth"
    shutil.copy(newest, tmp_path / "copy")  # its disk blocks may be those of another name
    newest.unlink()
    newest.write_bytes((tmp_path / "copy").read_bytes()[:-100])
    printed = Run(tmp_path / "run", "--data_path", images).assert_ends()
    assert "falling back to the previous checkpoint" in printed
    newest.with_name("checkpoint.pth.damaged").unlink()
    assert_same_run(tmp_path / "run", uninterrupted)
