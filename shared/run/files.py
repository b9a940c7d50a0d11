"""Files that appear when they are complete."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import safetensors


def reason_of(error: Exception) -> BaseException:
    """Why a write failed: torch wraps that into an error which does not tell."""
    return error.__context__ if isinstance(error.__context__, OSError) else error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its name if the block succeeds, and disappears if it does not.

    Raises:
        OSError: If the block cannot write it, also where torch or safetensors raise another error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.umask(umask := os.umask(0))
        temporary.chmod(0o666 & ~umask)  # safetensors makes files for their owner alone
        os.replace(temporary, path)
    except (RuntimeError, safetensors.SafetensorError) as error:  # torch and safetensors hide a full disk in these
        if "I/O error" not in str(error) and "inline_container" not in str(error):
            raise
        raise OSError(f"could not write {path}: {reason_of(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
