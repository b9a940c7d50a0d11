"""Checkpoints that survive a kill, a full disk and a torn write.

A file is written beside its final name, flushed to the disk, read back against the CRC-32 that the zip container
keeps of every record, and only then renamed into place; the file it replaces stays as ``*.previous``. At every
instant at least one complete checkpoint is on the disk, and none ever holds a NaN.
"""

import argparse
import contextlib
import errno
import os
import shutil
import signal
import socket
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor, nn

from shared import distributed
from shared.networks.weights import RUN_FILES, safe_load
from shared.optimisation.optim import keep_options, load_optimizer_state

from .attempt import Attempt, Interrupted, NotFinite
from .files import reason_of
from .memory import is_out_of_memory

SHORT_EPOCH_S = 60  # shorter epochs do not all end with a save


class CheckpointError(OSError):
    """A checkpoint could not be written or none of the existing ones can be read."""


def previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def save(path: str | Path, state: dict, keep_as: str | None = None) -> None:
    """Write ``state`` to ``path`` atomically and durably; the old file remains as ``<name>.previous``.

    Args:
        keep_as: Second name, relative to the same folder, under which the new file stays when later ones replace it.

    Raises:
        CheckpointError: If the file cannot be written (disk full, read-only or deleted folder).
        NotFinite: If a tensor holds an infinity or a NaN; the message names it.
        Whichever it is, what was on the disk before is untouched.
    """
    path = Path(path)
    if (name := first_not_finite(state)) is not None:
        raise NotFinite(f"{path} is not written: {name} is not finite; the checkpoint before it stays")
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        verify(temporary)
        if path.exists():
            _name(path, previous(path))
        if keep_as is not None:
            _name(temporary, path.parent / keep_as)  # before `path`: a kill in between repeats this save
            _fsync_folder((path.parent / keep_as).parent)
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        kept = "; the checkpoint before it is intact" if path.exists() else ""
        raise CheckpointError(f"could not write {path}: {reason_of(error)}{kept}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _name(file: Path, name: Path) -> None:
    """Give a file a second name, in one step; it gets a copy where the file system knows no hard links."""
    temporary = name.with_name(f".{name.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(file, temporary)
    except OSError:
        with open(file, "rb") as source, open(temporary, "wb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
    os.replace(temporary, name)
    temporary.unlink(missing_ok=True)  # two names of one file: replacing one with the other does nothing


def remove_leftovers(path: Path) -> None:
    """Remove the unfinished files of processes that were killed while they wrote ``path``."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink(missing_ok=True)


def first_not_finite(state) -> str | None:
    """Name of the first tensor, in nested dictionaries and lists, that holds an infinity or a NaN."""
    named = [(name, t) for name, t in tensors_in(state) if t.is_floating_point() and t.numel()]
    for device in {t.device for _, t in named}:
        names, tensors = zip(*[(name, t) for name, t in named if t.device == device], strict=True)
        # a NaN is its tensor's minimum and maximum; ten times as fast on a CPU as isfinite()
        extremes = torch.stack([torch.stack(t.aminmax()).double() for t in tensors])
        if not_finite := (~extremes.isfinite()).any(dim=1).nonzero().flatten().tolist():  # waits for a GPU once
            return names[not_finite[0]]
    return None


def tensors_in(state, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dictionaries and lists, with their places."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from tensors_in(value, f"{name}.{key}" if name else str(key))


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(path: Path) -> int:
    """Check every record of a zip checkpoint against its stored CRC-32.

    Returns:
        A checksum of the whole content.

    Raises:
        CheckpointError: If the file is torn, damaged or no checkpoint.
        OSError: If the file system does not let it be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = [(record.filename, record.CRC) for record in archive.infolist()]
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise zipfile.BadZipFile("a compressed record")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place that no file has
            raise
        raise CheckpointError(f"{path} is torn or not a checkpoint: {error}") from None
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: record {damaged} does not match its checksum")
    return zlib.crc32(repr(records).encode())


def load_latest(path: str | Path) -> dict | None:
    """The newest intact checkpoint among ``path`` and its ``.previous``, or None if neither exists.

    Every process must call this. A newest file with damaged content is reported on standard output and put aside as
    ``*.damaged``, and the previous one is used; so it is, and reported, when the newest file has been removed.

    Raises:
        CheckpointError: If files exist and none of them is intact.
        OSError: If one cannot be read now, which says nothing of its content.
        ValueError: If processes find different checkpoints, as with an output folder that not all nodes share.
    """
    path = Path(path)
    state, checksum, problems = None, None, {}
    for candidate in (path, previous(path)):
        try:
            # files of torch < 1.6 are no zip archives and carry no checksum
            checksum = candidate.stat().st_size if _is_legacy(candidate) else verify(candidate)
            state = safe_load(candidate)
            break
        except FileNotFoundError:
            continue
        except (CheckpointError, ValueError, RuntimeError) as error:
            reason = error.__context__  # of safe_load; the content has been found intact by then
            if not isinstance(error, CheckpointError) and (isinstance(reason, OSError) or is_out_of_memory(reason)):
                raise OSError(f"{candidate} cannot be read: {reason}") from error
            problems[candidate] = str(error)
            distributed.print_once(f"WARNING: {error}")
        except OSError as error:  # of the file system, which may soon be well again
            raise OSError(error.errno, error.strerror, str(candidate)) from error
    distributed.check_same_on_all_processes(checksum, f"the newest checkpoint in {path.parent} (a checksum)")
    if problems and state is None:
        raise CheckpointError("no intact checkpoint: " + "; ".join(problems.values()))
    if state is not None and candidate != path:
        missing = "" if problems else f"{path} is missing, "
        distributed.print_once(f"WARNING: {missing}falling back to the previous checkpoint {candidate}")
    if problems and distributed.is_main_process():
        # else the next save would replace the intact one with the damaged one
        os.replace(path, path.with_name(path.name + ".damaged"))
    return state


def load_latest_or_given(path: str | Path, given: str, weights_flag: str) -> dict:
    """The newest checkpoint of a run, or else the one that ``--resume`` names; {} if there is neither.

    Args:
        given: ``--resume``; ``""``: none.
        weights_flag: The flag for weights to start from, named when ``given`` holds no more than that.

    Raises:
        ValueError: If ``given`` is not the checkpoint of a training.
    """
    checkpoint = load_latest(path)
    if checkpoint is not None or not given:
        return checkpoint or {}
    checkpoint = load_latest(given)
    if checkpoint is None:
        raise ValueError(f"--resume {given}: there is no such file")
    if not {"optimizer", "epoch"} <= checkpoint.keys():
        raise ValueError(f"--resume {given} holds weights, no training state: give it as {weights_flag}")
    checkpoint.pop("log", None)  # its lines are in another folder
    return checkpoint


def _is_legacy(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x80\x02"  # a bare pickle


class Checkpointer:
    """Saves a run every so many steps or minutes, and once more when it is asked to stop.

    Use as a context manager around training: inside it SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 finish the current step,
    save and raise :class:`Interrupted`, also where the run is complete by then; a SIGINT after another signal stops at
    once, and only the steps since the last save have to be repeated. A repeated SIGTERM does not: schedulers and
    launchers send it twice.

    Args:
        path: The file that holds the newest state, e.g. ``<output_dir>/checkpoint.pth``.
        state: Called as ``state(epoch, next_step)`` on every rank; rank 0 writes what it returns.
        every_steps: Save after this many steps (0: only at the end of epochs).
        every_minutes: Save when this long has passed since the last save (0: never).
        is_good: Asked before each of these saves; where it says no, the last good checkpoint stays a while longer.
        owns_folder: False for a file of its own in the folder of another run, which goes on: an evaluation beside a
            training.
    """

    # of several signals the last one here counts: a job that gets SIGTERM and SIGUSR2 is to be requeued
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(
        self,
        path: str | Path,
        state: Callable[[int, int], dict],
        every_steps: int = 0,
        every_minutes: float = 0,
        is_good: Callable[[], bool] = lambda: True,
        owns_folder: bool = True,
    ):
        self.path = Path(path)
        self.state = state
        self.every_steps = every_steps
        self.every_s = every_minutes * 60
        self.is_good = is_good
        self.attempt = Attempt.current() if owns_folder else None  # a newer one at this run may take the folder over
        self.last_save = time.monotonic()
        self.received: int | None = None
        self._old_handlers: dict = {}
        if distributed.is_main_process():
            remove_leftovers(self.path)

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            distributed.print_once("WARNING: a run in a thread hears no signals, such as those that ask for a save")
            return self
        for number in self.SIGNALS:
            self._old_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind, error, traceback):
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        if kind is None:
            # one that came during the last save: all is saved, but what follows, a report, could outlast the warning
            request = distributed.max_over_processes(self._stop_request())
            if request > 1:
                raise Interrupted(self.SIGNALS[request - 2])

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
        self._save_or_stop(epoch, step_in_epoch, int((due or late) and self.is_good()))

    def stop_if_asked(self, epoch: int, step_in_epoch: int) -> None:
        """Save and stop if a signal has arrived on any rank: for work between steps that outlasts the time for a save.

        Every rank calls this equally often; the run comes back to that work, which starts again.
        """
        self._save_or_stop(epoch, step_in_epoch, 0)

    def _save_or_stop(self, epoch: int, step_in_epoch: int, request: int) -> None:
        # one small reduction: 0 go on, 1 save, more: save and stop on that signal
        request = distributed.max_over_processes(self._stop_request() or request)
        if request:
            self.save(epoch, step_in_epoch)
        if request > 1:
            raise Interrupted(self.SIGNALS[request - 2])

    def _stop_request(self) -> int:
        return 0 if self.received is None else 2 + self.SIGNALS.index(self.received)

    def after_epoch(self, epoch: int, keep_as: str | None = None, is_last: bool = True) -> None:
        """Save at the end of ``epoch``, keep the file under a second name if given, and stop if asked to.

        Of short epochs that need no file of their own, and are not the last one, one a minute is saved.
        """
        wanted = is_last or keep_as is not None or time.monotonic() - self.last_save > SHORT_EPOCH_S
        request = distributed.max_over_processes(self._stop_request() or int(wanted))
        if request:
            self.save(epoch + 1, 0, keep_as)
        if request > 1:
            raise Interrupted(self.SIGNALS[request - 2])

    def save(self, epoch: int, step_in_epoch: int, keep_as: str | None = None) -> None:
        """Write the state of a run that continues at ``step_in_epoch`` of ``epoch``."""
        state = self.state(epoch, step_in_epoch)
        error = None
        if distributed.is_main_process():
            if self.attempt is not None:
                self.attempt.check(self.path.parent)
            try:
                save(self.path, state, keep_as)
            except (CheckpointError, NotFinite) as failure:
                error = failure
        error = distributed.broadcast_object(error)  # a full disk on rank 0 stops every rank
        if error is not None:
            raise error
        self.last_save = time.monotonic()


def check_folder(path: Path) -> None:
    """Refuse to begin the run of checkpoint ``path`` in a folder that holds another run's.

    Raises:
        ValueError: If it does; the message names that checkpoint.
    """
    others = [file for name in RUN_FILES if not fnmatch(path.name, name) for file in path.parent.glob(name)]
    if others and not path.exists():
        raise ValueError(f"--output_dir {path.parent} holds {others[0].name} of another run: name another one")


def check_flags(checkpoint: dict, args: argparse.Namespace, must_match: tuple[str, ...]) -> None:
    """Compare the command line with the one the checkpoint was written with.

    Args:
        checkpoint: Holds the old flags under ``args``, as a dictionary or a Namespace.
        args: The flags of this run.
        must_match: Flags that shape the network; a difference in any other one is only reported.

    Raises:
        ValueError: If one of ``must_match`` differs, or the file is not the checkpoint of a training run.
    """
    if not isinstance(checkpoint, dict) or not {"args", "epoch"} <= checkpoint.keys():
        raise ValueError(f"the checkpoint in --output_dir {args.output_dir} is not that of a training run")
    old = checkpoint["args"] if isinstance(checkpoint["args"], dict) else vars(checkpoint["args"])
    for flag, value in vars(args).items():
        if (
            flag not in old
            or _as_list(old[flag]) == _as_list(value)
            or flag in ("output_dir", "local_rank", "num_workers", "device", "unset")
        ):
            continue
        if flag in must_match:
            raise ValueError(
                f"--{flag} {value} does not fit the checkpoint in {args.output_dir}, which was written with "
                f"--{flag} {old[flag]}; use that or another --output_dir"
            )
        distributed.print_once(f"resuming with --{flag} {value}, the checkpoint was written with {old[flag]}")


def _as_list(value):
    """A tuple of defaults and a list of the command line are equal."""
    return list(value) if isinstance(value, tuple) else value


def restore(
    checkpoint: dict, scheduled: tuple[str, ...] | None = None, /, **parts: nn.Module | torch.optim.Optimizer
) -> None:
    """Fill networks, losses and optimisers from the entries of ``checkpoint`` with their names, each one completely.

    Names of tensors may have the prefix ``module.``.

    Args:
        scheduled: Options of the optimisers' groups that the checkpoint restores; all others stay. None: it restores
            every one.

    Raises:
        ValueError: If an entry is missing or does not fit its part; the message names the entry.
    """
    for name, part in parts.items():
        if not isinstance(entry := checkpoint.get(name), dict):
            raise ValueError(f"the checkpoint cannot be resumed, it has no {name}: {', '.join(map(str, checkpoint))}")
        try:
            if isinstance(part, torch.optim.Optimizer):
                options = [dict(group) for group in part.param_groups]
                load_optimizer_state(part, entry)
                if scheduled is not None:
                    keep_options(part, options, but=scheduled)
            else:
                part.load_state_dict(without_prefix(entry, "module."))
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the checkpoint's {name} does not fit this run: {reason[:1000]}") from error


def resume_position(checkpoint: dict, batch_size: int, images: int, on_changed_run: str) -> tuple[int, int]:
    """(epoch, step in the epoch) at which a run with ``batch_size`` images per step goes on.

    Args:
        images: Checksum of the training images.
        on_changed_run: ``same_data`` goes on with another batch or number of processes, ``continue`` with other images
            as well, ``refuse`` with neither.

    Raises:
        ValueError: If the run has changed more than that.
    """
    epoch, step = checkpoint["epoch"], checkpoint.get("step_in_epoch", 0)
    world = distributed.get_world_size()
    old_batch, old_world = checkpoint.get("batch_size", batch_size), checkpoint.get("world_size", world)
    changes, other_data = [], checkpoint.get("images", images) != images
    if (old_batch, old_world) != (batch_size, world):
        changes.append(f"{old_batch} images per step on {old_world} processes before, {batch_size} on {world} now")
    if other_data:
        changes.append("other training images, or the same under other names")
    if changes and on_changed_run == "refuse":
        raise ValueError(f"--on_changed_run refuse: {'; '.join(changes)}")
    if other_data and on_changed_run == "same_data":
        raise ValueError(
            "the checkpoint to go on with was written with other training images, or the same under other names: name "
            "another output folder, or go on all the same with --on_changed_run continue"
        )
    if changes:
        distributed.print_once(
            f"resuming a changed run ({'; '.join(changes)}) after {step * old_batch // batch_size * batch_size} images "
            f"of epoch {epoch}: learning-rate steps, grouping into batches and random draws of the network differ from "
            "an unchanged run"
        )
    return epoch, step * old_batch // batch_size


def is_at_start(checkpoint: dict | None) -> bool:
    """Whether the run has not done a step yet; it may have been stopped during an evaluation before the first one."""
    return checkpoint is None or (checkpoint["epoch"], checkpoint.get("step_in_epoch", 0)) == (0, 0)


def without_prefix(state_dict: dict, prefix: str) -> dict:
    """The same tensors under names without ``prefix``, which DistributedDataParallel adds."""
    return {name.removeprefix(prefix): value for name, value in state_dict.items()}
