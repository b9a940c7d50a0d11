"""One attempt at a run: it can be asked to stop, and a newer attempt can take its place. Needs no torch.

After a host was given up for dead, SLURM starts the job again elsewhere; the old processes may still live behind a
broken network and go on writing. So each attempt puts its name on the output folder, and before it writes anything
it looks whether the folder still carries its name.
"""

import contextlib
import functools
import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path


class Interrupted(SystemExit):
    """The run stopped on a signal after saving its state; the exit code is 128 + signal number."""

    def __init__(self, signal_number: int):
        super().__init__(128 + signal_number)
        self.signal_number = signal_number


class NotFinite(RuntimeError):
    """Infinities or NaNs where a run cannot go on; its last checkpoint is good. Scripts end with exit code 3."""


class Superseded(SystemExit):
    """A newer attempt owns the output folder: this process ends (exit code 1) and leaves the folder as it is."""


@dataclass(frozen=True)
class Attempt:
    """The job that is running, and how often SLURM has started it again.

    A run that no launcher has submitted is a job of its own, and its number is always 0.
    """

    job: str
    number: int

    @classmethod
    def current(cls) -> "Attempt":
        if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            return cls(os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", 0)))
        # an interactive job can start several runs, and containers can have the same host name and process ids
        return cls(f"{socket.gethostname()}:{os.getpid()}:{_digits_of_this_process()}", 0)

    def claim(self, folder: str | Path) -> None:
        """Put this attempt's name on ``folder``; the last one to do so owns it.

        Raises:
            Superseded: If a later attempt of the same job was here first.
            OSError: If the folder cannot be written to.
        """
        owner = owner_of(folder)
        if owner is not None and owner.job == self.job and owner.number > self.number:
            raise Superseded(self._message(folder, owner))
        temporary = _file(folder).with_name(f".attempt.{socket.gethostname()}-{os.getpid()}")
        try:
            temporary.write_text(json.dumps(asdict(self)))
            os.replace(temporary, _file(folder))
        except OSError as error:  # that of a full disk does not name the file
            temporary.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(_file(folder))) from error

    def check(self, folder: str | Path) -> None:
        """Make sure that no other attempt has claimed ``folder``; a folder that nobody claimed is free.

        Raises:
            Superseded: If another one has.
        """
        owner = owner_of(folder)
        if owner not in (None, self):
            raise Superseded(self._message(folder, owner))

    def _message(self, folder: str | Path, owner: "Attempt") -> str:
        return (
            f"attempt {self.number} of job {self.job} writes nothing more: {folder} now belongs to attempt "
            f"{owner.number} of job {owner.job}"
        )


def owner_of(folder: str | Path) -> Attempt | None:
    """The attempt that claimed ``folder`` last, None if there is none.

    Raises:
        ValueError: If the file is not one of an attempt.
    """
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # a power cut can leave an empty file
        try:
            return Attempt(**json.loads(_file(folder).read_text()))
        except TypeError as error:
            raise ValueError(f"{_file(folder)} is of no run of this project: {error}") from error
    return None


@functools.cache
def _digits_of_this_process() -> str:
    return secrets.token_hex(4)


def _file(folder: str | Path) -> Path:
    return Path(folder) / "attempt.json"
