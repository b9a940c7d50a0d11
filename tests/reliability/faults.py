"""Disturbances from inside a run: each is called in the process before the training starts."""

import ctypes
import functools
import itertools
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Container
from pathlib import Path

import torch


def together(*faults: Callable[[], None]) -> None:
    for fault in faults:
        fault()


def before_call(owner, name: str, number: int | None, action: Callable[[], None]) -> None:
    """``action()`` before the ``number``-th call (from 1), or every one, of this function of a module or class."""
    function, calls = getattr(owner, name), itertools.count(1)

    def disturbed(*args, **kwargs):
        if number in (None, next(calls)):
            action()
        return function(*args, **kwargs)

    setattr(owner, name, disturbed)


def in_step(number: int | None, action: Callable[[], None]) -> None:
    """``action()`` inside the process's ``number``-th step (from 1), or every one, before its optimiser's."""
    from shared.run.run import Run

    before_call(Run, "update", number, action)


def slow_steps(seconds: float) -> None:
    in_step(None, functools.partial(time.sleep, seconds))


def send(*numbers: int) -> None:
    """These signals to this process, one after the other."""
    for number in numbers:
        os.kill(os.getpid(), number)


def signals_during_save(save: int, *numbers: int) -> None:
    """Signals that arrive while the process's ``save``-th checkpoint lies half finished on the disk."""
    from shared.run import checkpoint

    before_call(checkpoint, "verify", save, functools.partial(send, *numbers))


def signal_in_evaluation(evaluation: int, number: int) -> None:
    """A signal as the process's ``evaluation``-th k-NN evaluation (from 1) begins."""
    from shared.evaluation.knn_monitor import KNNMonitor

    before_call(KNNMonitor, "features", evaluation, functools.partial(send, number))


def kill_at_line(number: int, after_saves: int = 0) -> None:
    """SIGKILL before the ``number``-th line (from 1) of shared/checkpoint.py that runs in a save."""
    from shared.run import checkpoint

    save, calls, lines = checkpoint.save, [], []

    def trace(frame, event, argument):
        if frame.f_code.co_filename != checkpoint.__file__:
            return None
        if event == "line":
            lines.append(frame.f_lineno)
            if len(lines) == number:
                send(signal.SIGKILL)
        return trace

    def traced(*args, **kwargs) -> None:
        calls.append(args)
        sys.settrace(trace if len(calls) > after_saves else None)
        try:
            save(*args, **kwargs)
        finally:
            sys.settrace(None)

    checkpoint.save = traced


def kill_in_write(number: int) -> None:
    """SIGKILL in the middle of the ``number``-th write (from 1) to the temporary file of a save."""
    from shared.run import checkpoint

    writes = []

    class TornFile:
        def __init__(self, file):
            self.file = file

        def write(self, data) -> int:
            writes.append(len(data))
            if len(writes) == number:
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                send(signal.SIGKILL)
            return self.file.write(data)

        def __enter__(self):
            return self

        def __exit__(self, *exception) -> None:
            self.file.close()

        def __getattr__(self, name: str):
            return getattr(self.file, name)

    def torn_open(path: Path, mode: str = "r"):
        file = open(path, mode)  # noqa: SIM115
        return TornFile(file) if mode == "wb" else file

    checkpoint.open = torn_open


def nan_in_loss(steps: Container[int], rank: int = 0) -> None:
    """The loss of these steps (from 0, of the whole run) is not a number on one rank."""
    from shared import distributed
    from shared.run.run import Run

    backward = Run.backward

    def spoilt(self, loss: torch.Tensor, *optimizers) -> None:
        is_bad = self.step in steps and distributed.get_rank() == rank
        backward(self, loss * torch.nan if is_bad else loss, *optimizers)

    Run.backward = spoilt


def scale_loss_on_cpu(growth_interval: int) -> None:
    """The loss is scaled as for fp16 on a GPU, in float32 so that a CPU can do it."""
    from shared.run import run

    class Scaled(run.Precision):
        def __init__(self, amp: str, device: torch.device):
            super().__init__("fp32", device)
            self.scaler = torch.amp.GradScaler(device.type, growth_interval=growth_interval)

    run.Precision = Scaled


def kill_worker(epoch: int) -> None:
    """The loader process that gets the first batch of ``epoch`` is killed."""
    from shared.multicrop import MultiCropDataset

    main_process, fetch = os.getpid(), MultiCropDataset.__getitems__

    def fetch_or_die(self, keys):
        if keys[0][0] == epoch and os.getpid() != main_process:
            send(signal.SIGKILL)
        return fetch(self, keys)

    MultiCropDataset.__getitems__ = fetch_or_die


def remove_after_listing(path: Path) -> None:
    from shared.images import training_data

    open_source = training_data.open_source

    def open_and_remove(*args, **kwargs):
        source = open_source(*args, **kwargs)
        path.unlink(missing_ok=True)
        return source

    training_data.open_source = open_and_remove


def limit_file_size(folder: Path, from_step: int) -> None:
    """No file may grow beyond 100 kB from some step on: what a full disk looks like to one file."""
    limits = (100_000, resource.RLIM_INFINITY)
    in_step(from_step, functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits))


def fill_disk(folder: Path, from_step: int) -> None:
    """The file ``filler`` takes all that is free on the folder's disk but 100 kB, from some step on."""

    def fill() -> None:
        status = os.statvfs(folder)
        with open(folder / "filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - 100_000)

    in_step(from_step, fill)


def make_read_only(folder: Path, from_step: int) -> None:
    def forbid() -> None:
        give_up_privileges()
        folder.chmod(0o555)

    in_step(from_step, forbid)


def give_up_privileges() -> None:
    """Permissions count from now on, for root too: it keeps its name and loses its capabilities."""
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # _LINUX_CAPABILITY_VERSION_3
    if ctypes.CDLL(None).capset(ctypes.byref(header), ctypes.byref(nothing)) != 0:
        raise OSError("capset failed")


def remove_folder(folder: Path, from_step: int) -> None:
    in_step(from_step, functools.partial(shutil.rmtree, folder))
