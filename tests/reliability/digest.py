"""Print a digest of what a training has left in a folder: its checkpoints, and the lines of its logs.

python -m tests.reliability.digest FOLDER [--without-logs]
"""

import hashlib
import sys
from pathlib import Path

import torch

from shared.checkpoint import load_latest
from tests.reliability.runs import log_lines


def digest(folder: Path, with_logs: bool) -> str:
    result = hashlib.sha256()
    for path in sorted(folder.glob("*.pth")):
        state = load_latest(path)
        state["log"].pop("lengths")  # a clock's numbers are in the files
        state.pop("args")  # the folder's name is among them
        _add(result, path.name, state)
    if with_logs:
        _add(result, "metrics.jsonl", log_lines(folder))
        _add(result, "log.txt", (folder / "log.txt").read_text())
    return result.hexdigest()


def _add(result, name: str, value) -> None:
    if isinstance(value, torch.Tensor):
        result.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        result.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _add(result, f"{name} {key}", part)
    else:
        result.update(f"{name} {value!r}".encode())


if __name__ == "__main__":
    print(digest(Path(sys.argv[1]), with_logs="--without-logs" not in sys.argv))
