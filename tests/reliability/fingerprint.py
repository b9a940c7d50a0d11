"""Prints a hash of all that a finished run has left and that does not depend on a clock.

python fingerprint.py OUTPUT_DIR
"""

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import Tensor

from shared.run.checkpoint import load_latest
from tests.reliability.runs import log_lines


def add(digest, value) -> None:
    """Take nested dictionaries, lists, tensors and plain values into the hash."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    elif isinstance(value, dict | list | tuple):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            digest.update(f"{key}:".encode())
            add(digest, entry)
    else:
        digest.update(repr(value).encode())


def main(folder: Path) -> None:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.pth")):
        state = load_latest(path)
        state.pop("args")
        state["log"].pop("lengths")  # the clock's numbers are in the files
        add(digest, {path.name: state})
    add(digest, log_lines(folder))
    digest.update((folder / "log.txt").read_bytes())
    print(digest.hexdigest())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
