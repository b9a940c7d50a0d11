"""What it costs to save a run: ViT-S/16 with 65,536 outputs, student, teacher and AdamW's moments.

    python tests/benchmarks/bench_checkpoint.py [--folder FOLDER] [--rounds 5] [--out FILE.json]

Implementations, alternated, each over its own file of the round before:

- ``bare``: ``torch.save`` to the final name: in the page cache when it returns, torn by a kill;
- ``flushed``: the same and fsync: what a file that survives a power cut costs at least;
- ``ours``: ``shared.run.checkpoint.save``: search for NaN, write beside, fsync, read back against checksums, rename.

The share of a training is that of the default settings: a save every 15 minutes and one after every epoch, which took
25 minutes in the published run (ViT-S/16, 8 GPUs, 100 epochs in 1.75 days). A GPU adds the copy to the host's memory.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from dino.hub import build_backbone
from dino.losses import DINOLoss
from dino.vision_transformer import DINOHead
from shared.multicrop import MultiCropWrapper
from shared.optimisation.optim import build_optimizer, param_groups_no_decay_on_bias_and_norm
from shared.run import checkpoint

EPOCH_S = 1.75 * 24 * 3600 / 100  # published
SAVES_PER_EPOCH = EPOCH_S // (15 * 60) + 1


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


def save_bare(path: Path, state: dict) -> None:
    torch.save(state, path)


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


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Seconds that ``checkpoint.save`` spends in each of its parts."""
    seconds = {}
    parts = {
        "search for NaN": (checkpoint, "first_not_finite"),
        "serialise": (torch, "save"),
        "flush": (os, "fsync"),
        "read back": (checkpoint, "verify"),
        "rename": (os, "replace"),
    }

    def timed(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

        return call

    originals = {name: getattr(*where) for name, where in parts.items()}
    for name, (module, attribute) in parts.items():
        setattr(module, attribute, timed(name, originals[name]))
    try:
        yield seconds
    finally:
        for name, (module, attribute) in parts.items():
            setattr(module, attribute, originals[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", help="on the disk to measure; a temporary folder without it")
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="JSON file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    state = make_state(args.out_dim)
    ways = {"bare": save_bare, "flushed": save_flushed, "ours": checkpoint.save}
    times = {name: [] for name in ways}
    parts = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        paths = {name: Path(folder) / name / "checkpoint.pth" for name in ways}
        for name, path in paths.items():  # the first file of each is not timed: none is replaced
            path.parent.mkdir()
            ways[name](path, state)
        for _ in range(args.rounds):
            for name, way in ways.items():
                os.sync()  # what the way before has left to write
                with timed_parts() as seconds:
                    start = time.perf_counter()
                    way(paths[name], state)
                    times[name].append(time.perf_counter() - start)
                if name == "ours":
                    parts.append(seconds)
        size = paths["ours"].stat().st_size
        same = records(paths["ours"]) == records(paths["bare"])

    ours_s = statistics.median(times["ours"])
    result = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "versions": {"torch": torch.__version__},
        "bytes": size,
        "same_content_as_bare": same,
        "ways": {},
        "parts_ms": {name: 1e3 * statistics.median(p[name] for p in parts) for name in parts[0]},
        "percent_of_training": 100 * ours_s * SAVES_PER_EPOCH / EPOCH_S,
        "saves_per_epoch_of_minutes": [SAVES_PER_EPOCH, EPOCH_S / 60],
    }
    print(f"{size / 2**20:.0f} MiB, {args.threads} threads")
    print(f"{'way':8} {'ms':>7}  over bare (min .. max of {args.rounds} rounds)")
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times["bare"], strict=True)]
        spread = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        result["ways"][name] = {"seconds": values, "over_bare": spread}
        ms = 1e3 * statistics.median(values)
        print(f"{name:8} {ms:7.0f}  {spread['median']:.2f} ({spread['min']:.2f} .. {spread['max']:.2f})")
    print("ours in ms:", ", ".join(f"{name} {ms:.0f}" for name, ms in result["parts_ms"].items()))
    print(f"{result['percent_of_training']:.2f} % of a training with {SAVES_PER_EPOCH:.0f} saves in an epoch of "
          f"{EPOCH_S / 60:.0f} minutes")  # fmt: skip
    result["targets"] = {
        "content of the file as bare torch.save writes it": same,
        "less than 1 % of the training": result["percent_of_training"] < 1,
    }
    for target, met in result["targets"].items():
        print(f"target: {target}: {'met' if met else 'not met'}")
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {result['peak_mib']:.0f} MiB")
    print(f"versions: torch {torch.__version__}")
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
