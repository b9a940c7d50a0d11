"""What it costs to save a run: ViT-S/16 with 65,536 outputs, student, teacher and AdamW's moments.

    python tests/benchmarks/bench_checkpoint.py [--folder FOLDER] [--rounds 5] [--out FILE.json]

Implementations, alternated, each over its own file of the round before:

- ``bare``: ``torch.save`` to the final name: in the page cache when it returns, torn by a kill;
- ``flushed``: the same and fsync: what a file that survives a power cut costs at least;
- ``ours``: ``shared.run.checkpoint.save``: search for NaN, write beside, fsync, read back against checksums, rename.

The share of a training is that of the default settings: a save every 15 minutes and one after every epoch, which took
25 minutes in the published run (ViT-S/16, 8 GPUs, 100 epochs in 1.75 days). A GPU adds the copy to the host's memory.
"""

import contextlib
import os
import statistics
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import shared.run.passive_threads  # noqa: F401
from dino.hub import build_backbone
from dino.losses import DINOLoss
from dino.vision_transformer import DINOHead
from shared.multicrop import MultiCropWrapper
from shared.optimisation.optim import build_optimizer, param_groups_no_decay_on_bias_and_norm
from shared.run import checkpoint
from tests.benchmarks.harness import alternate, compare, finish, get_args_parser

EPOCH_S = 1.75 * 24 * 3600 / 100  # published
SAVES_PER_EPOCH = EPOCH_S // (15 * 60) + 1
PARTS = {
    "search for NaN": (checkpoint, "first_not_finite"),
    "serialise": (torch, "save"),
    "flush": (os, "fsync"),
    "read back": (checkpoint, "verify"),
    "rename": (os, "replace"),
}


def make_state(out_dim: int) -> dict:
    """What ``dino/main_dino.py`` saves, without the few numbers beside the tensors."""
    torch.manual_seed(0)
    backbone, dim = build_backbone("vit_small", 16)
    student = MultiCropWrapper(backbone, DINOHead(dim, out_dim))
    optimizer = build_optimizer("adamw", param_groups_no_decay_on_bias_and_norm(student))
    for p in student.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    tensors = student.state_dict()
    return {
        "student": {f"module.{name}": value for name, value in tensors.items()},
        "teacher": {name: value.clone() for name, value in tensors.items()},
        "optimizer": optimizer.state_dict(),
        "dino_loss": DINOLoss(out_dim, 10, 0.04, 0.04, 0, 100).state_dict(),
        "epoch": 0,
    }


def save_flushed(path: Path, state: dict) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def records(path: Path) -> dict[str, int]:
    """Checksums of the records of a checkpoint; ``torch.save`` puts them into a folder named like the file."""
    with zipfile.ZipFile(path) as archive:
        names = ((record.filename.partition("/")[2], record.CRC) for record in archive.infolist())
        return {name: checksum for name, checksum in names if not name.startswith(".data/")}


def parts_of_a_save(path: Path, state: dict) -> dict[str, float]:
    """Milliseconds that ``checkpoint.save`` spends in each of its parts."""
    ms = defaultdict(float)

    def timed(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                ms[name] += 1e3 * (time.perf_counter() - start)

        return call

    with contextlib.ExitStack() as patches:
        for name, where in PARTS.items():
            patches.enter_context(mock.patch.object(*where, timed(name, getattr(*where))))
        checkpoint.save(path, state)
    return dict(ms)


def main() -> None:
    parser = get_args_parser(__doc__, rounds=5)
    parser.add_argument("--folder", help="on the disk to measure; a temporary folder without it")
    parser.add_argument("--out_dim", type=int, default=65536)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    state = make_state(args.out_dim)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        paths = {name: Path(folder) / name / "checkpoint.pth" for name in ("bare", "flushed", "ours")}
        for path in paths.values():
            path.parent.mkdir()
        ways = {
            "bare": lambda: torch.save(state, paths["bare"]),
            "flushed": lambda: save_flushed(paths["flushed"], state),
            "ours": lambda: checkpoint.save(paths["ours"], state),
        }
        # the first file of each replaces none: the round that warms up; `sync` writes what the way before has left
        times = alternate(ways, args.rounds, before=os.sync)
        parts = [parts_of_a_save(paths["ours"], state) for _ in range(args.rounds)]
        size, same = paths["ours"].stat().st_size, records(paths["ours"]) == records(paths["bare"])

    print(f"{size / 2**20:.0f} MiB, {args.threads} threads")
    percent = 100 * statistics.median(times["ours"]) * SAVES_PER_EPOCH / EPOCH_S
    result = {
        "bytes": size,
        "ways": compare(times, "bare"),
        "parts_ms": {name: statistics.median(p[name] for p in parts) for name in PARTS},
        "percent_of_training": percent,
    }
    print("ours in ms:", ", ".join(f"{name} {ms:.0f}" for name, ms in result["parts_ms"].items()))
    epoch = f"{SAVES_PER_EPOCH:.0f} saves in an epoch of {EPOCH_S / 60:.0f} minutes"
    print(f"{percent:.2f} % of a training with {epoch}")
    targets = {"content of the file as bare torch.save writes it": same, "less than 1 % of the training": percent < 1}
    finish(args, result, targets)


if __name__ == "__main__":
    main()
