"""What a mask saves: time per image and peak memory of one MSN training step at mask ratios 0, 0.3, 0.5 and 0.7.

    python tests/benchmarks/bench_msn.py [--threads 2] [--rounds 5] [--out FILE.json]
    python tests/benchmarks/bench_msn.py --model_name deit_base --batch_size 4          # a larger network

The step is ``train_one_epoch`` of ``msn/main.py`` with one masked random anchor (the paper's table of costs): encoder
forward and backward on what the mask leaves, target encoder on the whole view, loss, AdamW, EMA. ``anchor`` is the part
that a mask can save, forward and backward of the encoder alone. Each runs in a process of its own, so that peak memory
is told apart; rounds alternate.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from msn.losses import MSNLoss, new_prototypes
from msn.main import param_groups, train_one_epoch
from msn.schedules import Schedules, learning_rates, linear, weight_decays
from msn.vision_transformer import ProjectionHead, VisionTransformer, build, num_kept_patches
from shared.optimisation.optim import build_optimizer
from shared.run.memory import keep_freed_memory
from tests.benchmarks.harness import InProcess, alternate, as_text, finish, get_args_parser, spread
from tests.loop_run import LoopRun

RATIOS = (0.0, 0.3, 0.5, 0.7)
STEPS = 1_000  # of the schedules


class Step:
    """One training step on random images, again and again."""

    def __init__(self, size: argparse.Namespace, ratio: float):
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.size, self.ratio = size, ratio
        self.encoder, self.target_encoder = (self.make_encoder() for _ in range(2))
        self.target_encoder.requires_grad_(False)
        self.prototypes = nn.Parameter(new_prototypes(1024, 256).to(self.device))
        self.criterion = MSNLoss(1024).to(self.device)
        self.optimizer = build_optimizer("adamw", param_groups(self.encoder, self.prototypes))
        length = (1, STEPS)
        self.schedules = Schedules(
            learning_rates(2e-4, 1e-3, 1e-6, *length, 0),
            weight_decays(0.04, 0.4, *length),
            linear(0.996, 1, *length),
            linear(0.25, 0.25, *length),
        )
        images = torch.randn(2 * size.batch_size, 3, size.rand_size, size.rand_size)
        self.batch = ([images], torch.zeros(size.batch_size), torch.arange(size.batch_size))
        self.run = LoopRun(tempfile.mkdtemp(), STEPS, amp=size.amp, device=str(self.device), log_freq=STEPS)

    def make_encoder(self) -> VisionTransformer:
        encoder = build(self.size.model_name, img_size=self.size.rand_size)
        encoder.fc = ProjectionHead(encoder.embed_dim)
        return encoder.to(self.device)

    def step(self) -> None:
        train_one_epoch(
            self.encoder,
            self.target_encoder,
            self.prototypes,
            self.criterion,
            [self.batch],
            self.optimizer,
            self.schedules,
            self.run,
            patch_drop=self.ratio,
            clip_grad=3.0,
        )

    def anchor(self) -> None:
        images = self.batch[0][0][self.size.batch_size :].to(self.device)
        with self.run.precision.autocast():
            self.encoder(images, self.ratio).sum().backward()
        self.encoder.zero_grad(set_to_none=True)


def make_work(size: argparse.Namespace, ratio: float, what: str) -> Callable[[], None]:
    """``step`` or ``anchor``, finished on the device when it returns."""
    torch.set_num_threads(size.threads)
    keep_freed_memory()
    step = Step(size, ratio)
    step.step()  # allocates the optimiser's state

    def work() -> None:
        getattr(step, what)()
        if step.device.type == "cuda":
            torch.cuda.synchronize()

    return work


def measure(size: argparse.Namespace) -> list[dict]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    jobs = [(ratio, what) for ratio in RATIOS for what in ("step", "anchor")]
    processes = {job: InProcess(make_work, size, *job, device=device) for job in jobs}
    times = alternate(processes, size.rounds)
    num_patches = build(size.model_name, img_size=size.rand_size).patch_embed.num_patches
    rows = []
    for ratio in RATIOS:
        process = processes[ratio, "step"]
        row = {"mask": ratio, "kept": num_kept_patches(num_patches, ratio) / num_patches}
        row |= {"peak_mib": process.peak_mib, "imports_mib": process.idle_mib}
        for what in ("step", "anchor"):
            seconds, whole = times[ratio, what], times[0.0, what]
            row[f"{what}_ms_per_image"] = 1000 * statistics.median(seconds) / size.batch_size
            row[f"{what}_share"] = spread(s / w for s, w in zip(seconds, whole, strict=True))  # pairs within a round
        rows.append(row)
    for process in processes.values():
        process.stop()
    return rows


def main() -> None:
    parser = get_args_parser(__doc__, rounds=5)
    parser.add_argument("--model_name", default="deit_small")
    parser.add_argument("--rand_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--amp", default="fp32")
    parser.set_defaults(threads=os.cpu_count())
    size = parser.parse_args()
    rows = measure(size)
    print(f"{size.model_name}, {size.rand_size} px, batch {size.batch_size}, {size.amp}, one random anchor")
    print("mask  kept   anchor: ms/image, share   step: ms/image, share   peak MiB (imports)")
    for row in rows:
        print(
            f"{row['mask']:.1f}   {row['kept']:.2f}   {row['anchor_ms_per_image']:10.1f}   "
            f"{as_text(row['anchor_share'])}   "
            f"{row['step_ms_per_image']:8.1f}   {row['step_share']['median']:.2f}   "
            f"{row['peak_mib']:8.0f} ({row['imports_mib']:.0f})"
        )
    finish(size, {"rows": rows})


if __name__ == "__main__":
    main()
