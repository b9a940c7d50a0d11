"""Checkpoints that survive a kill, a full disk and a torn write.

A file is written beside its final name, flushed to the disk, read back against the CRC-32 that the zip container
keeps of every record, and only then renamed into place; the file it replaces stays as ``*.previous``. At every
instant at least one complete checkpoint is on the disk.
"""

import argparse
import contextlib
import os
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from . import distributed
from .attempt import Attempt, Interrupted
from .weights import safe_load


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or none of the existing ones can be read."""


def previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def save(path: str | Path, state: dict) -> None:
    """Write ``state`` to ``path`` atomically and durably; the old file remains as ``<name>.previous``.

    Raises:
        CheckpointError: If the file cannot be written (disk full, read-only or deleted folder). What was on the disk
            before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        verify(temporary)
        if path.exists():
            # a second name for the old file first: `path` itself never disappears
            link = path.with_name(f".{path.name}.link-{os.getpid()}")
            link.unlink(missing_ok=True)
            os.link(path, link)
            os.replace(link, previous(path))
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path}: {error}; the previous checkpoint is intact") from error


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(path: Path) -> None:
    """Raise ``CheckpointError`` unless every record of a zip checkpoint matches its stored CRC-32."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{path} is torn or not a checkpoint: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is corrupt: record {damaged} does not match its checksum")


def load_latest(path: str | Path, map_location: str | torch.device = "cpu") -> dict | None:
    """The newest intact checkpoint among ``path`` and its ``.previous``, or None if neither exists.

    A damaged newest file is reported on standard output and the previous one is used.

    Raises:
        CheckpointError: If files exist and none of them is intact.
    """
    path = Path(path)
    candidates = [p for p in (path, previous(path)) if p.exists()]
    problems = []
    for candidate in candidates:
        try:
            # files of torch < 1.6 are no zip archives and carry no checksum
            if zipfile.is_zipfile(candidate) or candidate.suffix == ".previous" or not _is_legacy(candidate):
                verify(candidate)
            state = safe_load(candidate, map_location=map_location)
        except (CheckpointError, OSError, ValueError, RuntimeError) as error:
            problems.append(str(error))
            distributed.print_once(f"WARNING: {error}")
            continue
        if problems:
            distributed.print_once(f"WARNING: falling back to the previous checkpoint {candidate}")
        return state
    if problems:
        raise CheckpointError("no intact checkpoint: " + "; ".join(problems))
    return None


def _is_legacy(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x80\x02"  # a bare pickle


class Checkpointer:
    """Saves a run every so many steps or minutes, and once more when it is asked to stop.

    Use as a context manager around training: inside it SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 finish the current step,
    save and raise :class:`Interrupted`; a SIGINT after another signal stops at once, and only the steps since the last
    save have to be repeated. A repeated SIGTERM does not: schedulers and launchers send it twice.

    Args:
        path: The file that holds the newest state, e.g. ``<output_dir>/checkpoint.pth``.
        state: Called as ``state(epoch, next_step)`` on every rank; rank 0 writes what it returns.
        every_steps: Save after this many steps (0: only at the end of epochs).
        every_minutes: Save when this long has passed since the last save (0: never).
    """

    # of several signals the last one here counts: a job that gets SIGTERM and SIGUSR2 is to be requeued
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(
        self,
        path: str | Path,
        state: Callable[[int, int], dict],
        every_steps: int = 0,
        every_minutes: float = 0,
    ):
        self.path = Path(path)
        self.state = state
        self.every_steps = every_steps
        self.every_s = every_minutes * 60
        self.attempt = Attempt.current()  # a newer attempt at the same run may take the folder over
        self.last_save = time.monotonic()
        self.received: int | None = None
        self._old_handlers: dict = {}

    def __enter__(self):
        for number in self.SIGNALS:
            self._old_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception):
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        name = signal.Signals(number).name
        if self.received is not None and number == signal.SIGINT:
            os.write(2, f"\n{name}: stopping now, without saving\n".encode())
            raise Interrupted(number)
        self.received = max(self.received or number, number, key=self.SIGNALS.index)
        os.write(2, f"\n{name}: finishing this step, then saving\n".encode())  # print is not reentrant

    def after_step(self, epoch: int, step_in_epoch: int) -> None:
        """Save if due, and stop if a signal has arrived on any rank.

        Every rank calls this after every step, with the number of steps finished in the epoch.
        """
        due = self.every_steps > 0 and step_in_epoch % self.every_steps == 0
        late = self.every_s > 0 and time.monotonic() - self.last_save > self.every_s
        # one small reduction: 0 go on, 1 save, more: save and stop on that signal
        request = distributed.max_over_processes(self._stop_request() or int(due or late))
        if request:
            self.save(epoch, step_in_epoch)
        if request > 1:
            raise Interrupted(self.SIGNALS[request - 2])

    def _stop_request(self) -> int:
        return 0 if self.received is None else 2 + self.SIGNALS.index(self.received)

    def after_epoch(self, epoch: int, keep_as: str | None = None) -> None:
        """Save at the end of ``epoch``, keep the file under a second name if given, and stop if asked to."""
        self.save(epoch + 1, 0)
        if keep_as is not None and distributed.is_main_process():
            kept = self.path.with_name(keep_as)
            kept.unlink(missing_ok=True)
            os.link(self.path, kept)
        request = distributed.max_over_processes(self._stop_request())
        if request:
            raise Interrupted(self.SIGNALS[request - 2])

    def save(self, epoch: int, step_in_epoch: int) -> None:
        """Write the state of a run that continues at ``step_in_epoch`` of ``epoch``."""
        state = self.state(epoch, step_in_epoch)
        error = None
        if distributed.is_main_process():
            self.attempt.check(self.path.parent)
            try:
                save(self.path, state)
            except CheckpointError as failure:
                error = str(failure)
        error = distributed.broadcast_object(error)  # a full disk on rank 0 stops every rank
        if error is not None:
            raise CheckpointError(error)
        self.last_save = time.monotonic()


def check_flags(checkpoint: dict, args: argparse.Namespace, must_match: tuple[str, ...]) -> None:
    """Compare the command line with the one the checkpoint was written with.

    Args:
        checkpoint: Holds the old flags under ``args``, as a dictionary or a Namespace.
        args: The flags of this run.
        must_match: Flags that shape the network; a difference in any other one is only reported.

    Raises:
        ValueError: If one of ``must_match`` differs.
    """
    old = checkpoint["args"] if isinstance(checkpoint["args"], dict) else vars(checkpoint["args"])
    for flag, value in vars(args).items():
        if flag not in old or old[flag] == value or flag in ("output_dir", "local_rank", "num_workers", "device"):
            continue
        if flag in must_match:
            raise ValueError(
                f"--{flag} {value} does not fit the checkpoint in {args.output_dir}, which was written with "
                f"--{flag} {old[flag]}; use that or another --output_dir"
            )
        distributed.print_once(f"resuming with --{flag} {value}, the checkpoint was written with {old[flag]}")


def resume_position(checkpoint: dict, batch_size: int, on_changed_run: str) -> tuple[int, int]:
    """(epoch, step in the epoch) at which a run with ``batch_size`` images per step goes on.

    Raises:
        ValueError: If the run has changed and ``on_changed_run`` is ``refuse``.
    """
    epoch, step = checkpoint["epoch"], checkpoint.get("step_in_epoch", 0)
    old_batch, old_world = checkpoint.get("batch_size", batch_size), checkpoint.get("world_size")
    world = distributed.get_world_size()
    if old_batch == batch_size and old_world in (None, world):
        return epoch, step
    change = f"{old_batch} images per step on {old_world} processes before, {batch_size} on {world} now"
    if on_changed_run == "refuse":
        raise ValueError(f"--on_changed_run refuse: {change}")
    seen = step * old_batch
    distributed.print_once(
        f"resuming a changed run ({change}) after {seen - seen % batch_size} images of epoch {epoch}: learning-rate "
        "steps, grouping into batches and random draws of the network differ from an unchanged run"
    )
    return epoch, seen // batch_size


def without_prefix(state_dict: dict, prefix: str) -> dict:
    """The same tensors under names without ``prefix``, which DistributedDataParallel adds."""
    return {name.removeprefix(prefix): value for name, value in state_dict.items()}
