"""What a checkpoint of the paper's ViT-S/16 with 65,536 outputs costs a run.

    python tests/benchmarks/bench_checkpoint.py [--device cuda] [--folder DIR] [--repeats 5] [--out FILE.json]

Student, teacher and AdamW's moments (700 MB), saved in turns by ``torch.save`` alone, which a kill or a full disk can
turn into the loss of the run, and by ``shared.checkpoint.save``, whose parts are timed: the check for NaN, writing
(with the copy from the device), flushing to the disk, and reading back against the checksums.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from dino.networks import build_backbone
from dino.vision_transformer import DINOHead
from shared import checkpoint
from shared.optim import build_optimizer, param_groups_no_decay_on_bias_and_norm

INTERVAL_S = 15 * 60  # --saveckp_minutes


def training_state(device: torch.device, out_dim: int) -> dict:
    """What main_dino.py saves, after one update."""
    networks = []
    for _ in range(2):
        backbone, embed_dim = build_backbone("vit_small", 16)
        networks.append(nn.ModuleDict({"backbone": backbone, "head": DINOHead(embed_dim, out_dim)}).to(device))
    student, teacher = networks
    optimizer = build_optimizer("adamw", param_groups_no_decay_on_bias_and_norm(student))
    for p in student.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    return {"student": student.state_dict(), "teacher": teacher.state_dict(), "optimizer": optimizer.state_dict()}


class Parts:
    """Seconds inside functions of a module, which are replaced by timed ones."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def watch(self, owner, name: str, part: str) -> None:
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    device = torch.device(args.device)
    state = training_state(device, args.out_dim)
    parts = Parts()
    parts.watch(checkpoint, "first_not_finite", "check_finite_ms")
    parts.watch(checkpoint, "verify", "read_back_ms")
    parts.watch(os, "fsync", "flush_ms")
    runs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "checkpoint.pth"
        for _ in range(args.repeats + 1):
            parts.seconds.clear()
            start = time.perf_counter()
            torch.save(state, Path(folder) / "plain.pth")
            plain = time.perf_counter() - start
            os.sync()  # the one's dirty pages are not the other's to write
            start = time.perf_counter()
            checkpoint.save(path, state)
            total = time.perf_counter() - start
            run = {"plain_ms": plain, "total_ms": total, **parts.seconds}
            run["write_ms"] = total - sum(parts.seconds.values())
            runs.append({name: 1000 * seconds for name, seconds in run.items()})
            os.sync()
        size_mb = path.stat().st_size / 1e6
        start = time.perf_counter()
        checkpoint.load_latest(path)
        load_ms = 1000 * (time.perf_counter() - start)

    medians = {name: round(statistics.median(run[name] for run in runs[1:]), 1) for name in runs[0]}  # first: warm-up
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "size_mb": round(size_mb, 1),
        **medians,
        "slowest_ms": round(max(run["total_ms"] for run in runs[1:]), 1),
        "load_ms": round(load_ms, 1),
        "percent_at_every_15_minutes": round(100 * medians["total_ms"] / 1000 / INTERVAL_S, 3),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
