"""One MSN training step beside a textbook's, and what a mask saves: mask ratios of 0, 0.3, 0.5 and 0.7.

    python tests/benchmarks/bench_msn.py [--threads 2] [--rounds 5] [--compile] [--out FILE.json]
    python tests/benchmarks/bench_msn.py --model_name deit_base --batch_size 4          # a larger network

Beside the step as a textbook writes it (this file) with a mask of 0.7, the kinds of step are those of ``steps.py``.

The step is ``train_one_epoch`` of ``msn/main.py`` with one masked random anchor (the paper's table of costs): encoder
forward and backward on what the mask leaves, target encoder on the whole view, loss, AdamW, EMA. ``anchor`` is the part
that a mask can save, forward and backward of the encoder alone. Each runs in a process of its own, so that peak memory
is told apart; rounds alternate.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import shared.run.passive_threads  # noqa: F401
from msn.losses import MSNLoss, new_prototypes
from msn.main import param_groups, train_one_epoch
from msn.schedules import Schedules
from msn.vision_transformer import ProjectionHead, VisionTransformer, build, num_kept_patches
from shared.networks.compiling import compile_network
from shared.optimisation.optim import build_optimizer
from shared.run.memory import keep_freed_memory
from tests.benchmarks import steps
from tests.benchmarks.bench_step import PlainViT
from tests.benchmarks.harness import InProcess, alternate, as_text, finish, get_args_parser, spread

RATIOS = (0.0, 0.3, 0.5, 0.7)
PROTOTYPES, DIM = 1024, 256
LR, WEIGHT_DECAY, MOMENTUM, SHARPEN, CLIP = 1e-4, 0.04, 0.996, 0.25, 3.0


class PlainEncoder(PlainViT):
    """The textbook's ViT on what a mask leaves, and the head."""

    def __init__(self, size: argparse.Namespace):
        dim, num_heads = {"deit_tiny": (192, 3), "deit_small": (384, 6), "deit_base": (768, 12)}[size.model_name]
        super().__init__(16, dim, num_heads, size.rand_size, 0.0)
        self.fc = ProjectionHead(dim)

    def forward(self, x: Tensor, patch_drop: float = 0.0) -> Tensor:
        tokens = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1) + self.pos_embed
        if patch_drop:
            num_patches = tokens.shape[1] - 1
            kept = torch.randperm(num_patches)[: num_kept_patches(num_patches, patch_drop)]
            tokens = tokens[:, torch.cat([torch.zeros(1, dtype=torch.long), 1 + kept])]
        return self.fc(self.norm(self.blocks(tokens))[:, 0])


class PlainStep:
    def __init__(self, size: argparse.Namespace, ratio: float, amp: str):
        self.ratio = ratio
        self.encoder, self.target_encoder = (PlainEncoder(size).to(size.device) for _ in range(2))
        self.prototypes = nn.Parameter(torch.empty(PROTOTYPES, DIM, device=size.device))
        self.autocast = torch.autocast(size.device, torch.bfloat16, enabled=amp == "bf16")

    def start(self, state: dict, size: argparse.Namespace) -> None:
        self.encoder.load_state_dict(state["encoder"])
        self.target_encoder.load_state_dict(state["encoder"])
        self.prototypes.data.copy_(state["prototypes"])
        parameters = list(self.encoder.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
            {"params": [self.prototypes], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR)
        self.images = random_images(size).to(size.device)

    def __call__(self) -> float:
        targets, anchors = self.images.chunk(2)
        with self.autocast:
            anchors = self.encoder(anchors, self.ratio)
            with torch.no_grad():
                targets = self.target_encoder(targets)
        with torch.no_grad():
            codes = self.assignments(targets) ** (1 / SHARPEN)
            codes = (codes / codes.sum(dim=1, keepdim=True)).T
            codes = codes / codes.sum()
            for _ in range(3):
                codes = codes / codes.sum(dim=1, keepdim=True) / codes.shape[0]
                codes = codes / codes.sum(dim=0, keepdim=True) / codes.shape[1]
            codes = (codes * codes.shape[1]).T
        probs = self.assignments(anchors)
        mean = probs.mean(dim=0)
        loss = -(codes * probs.log()).sum(dim=1).mean() + (mean * mean.log()).sum() + math.log(PROTOTYPES)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.encoder.parameters(), CLIP)
        self.optimizer.step()
        with torch.no_grad():
            for p, average in zip(self.encoder.parameters(), self.target_encoder.parameters(), strict=True):
                average.mul_(MOMENTUM).add_((1 - MOMENTUM) * p)
        return loss.item()

    def assignments(self, embeddings: Tensor) -> Tensor:
        cosines = F.normalize(embeddings.float(), dim=1) @ F.normalize(self.prototypes, dim=1).T
        return F.softmax(cosines / 0.1, dim=1)


class Step:
    """Our training step on random images, again and again."""

    def __init__(self, size: argparse.Namespace, ratio: float, amp: str):
        torch.manual_seed(0)
        self.device = torch.device(size.device)
        self.size, self.ratio = size, ratio
        self.encoder, self.target_encoder = (self.make_encoder() for _ in range(2))
        self.target_encoder.requires_grad_(False)
        self.prototypes = nn.Parameter(new_prototypes(PROTOTYPES, DIM).to(self.device))
        self.criterion = MSNLoss(PROTOTYPES).to(self.device)
        self.optimizer = build_optimizer("adamw", param_groups(self.encoder, self.prototypes))
        self.schedules = Schedules(*(np.full(steps.STEPS, value) for value in (LR, WEIGHT_DECAY, MOMENTUM, SHARPEN)))
        self.batch = ([random_images(size)], torch.zeros(size.batch_size), torch.arange(size.batch_size))
        self.run = steps.StepRun(amp, size.device)

    def start(self, state: dict) -> None:
        self.encoder.load_state_dict(state["encoder"])
        self.target_encoder.load_state_dict(state["encoder"])
        self.prototypes.data.copy_(state["prototypes"])

    def make_encoder(self) -> VisionTransformer:
        encoder = build(self.size.model_name, img_size=self.size.rand_size)
        encoder.fc = ProjectionHead(encoder.embed_dim)
        return encoder.to(self.device)

    def step(self) -> float:
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
            clip_grad=CLIP,
        )
        return self.run.last_loss

    def anchor(self) -> None:
        images = self.batch[0][0][self.size.batch_size :].to(self.device)
        with self.run.precision.autocast():
            self.encoder(images, self.ratio).sum().backward()
        self.encoder.zero_grad(set_to_none=True)


def random_images(size: argparse.Namespace) -> Tensor:
    """Target views, then anchors."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2 * size.batch_size, 3, size.rand_size, size.rand_size, generator=generator)


def make_step(kind: str, size: argparse.Namespace, ratio: float, weights: str) -> Callable[[], float]:
    """A step on the same views again and again, from the stored weights; it gives the loss: the device has finished."""
    amp, state = steps.precision_of(kind), torch.load(weights, weights_only=True)
    if kind.startswith("plain"):
        step = PlainStep(size, ratio, amp)
        step.start(state, size)
        return step
    keep_freed_memory()
    ours = Step(size, ratio, amp)
    ours.start(state)
    if kind.endswith("compiled"):
        for network in (ours.encoder, ours.target_encoder):
            compile_network(network)
    return ours.step


def turns(kinds: list[str], size: argparse.Namespace, rounds: int, ratio: float) -> steps.Turns:
    """Steps of every kind in turns, from the same weights."""
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        ours = Step(argparse.Namespace(**(vars(size) | {"device": "cpu"})), ratio, "fp32")
        torch.save({"encoder": ours.encoder.state_dict(), "prototypes": ours.prototypes.detach()}, file.name)
        return steps.take_turns(make_step, kinds, size, rounds, ratio, file.name)


def beside_plain(size: argparse.Namespace) -> dict:
    """Our step and the textbook's with a mask, and how far losses without one are apart."""
    kinds, ratio = steps.kinds_of(size), RATIOS[-1]
    found = turns([*kinds, *steps.products_of(kinds)], size, size.rounds, ratio)
    with FlopCounterMode(display=False) as counter:
        one = argparse.Namespace(**(vars(size) | {"batch_size": 2, "device": "cpu"}))
        plain = PlainStep(one, ratio, "fp32")
        plain.start({"encoder": plain.encoder.state_dict(), "prototypes": new_prototypes(PROTOTYPES, DIM)}, one)
        plain()
    rows = steps.compare_steps(found, size.batch_size * counter.get_total_flops() // 2, size.batch_size)
    small = argparse.Namespace(**(vars(size) | {"batch_size": 4, "rand_size": 64, "launches": False}))
    uncompiled = [kind for kind in kinds if not kind.endswith("compiled")]
    return {
        "steps": rows,
        "differences_of_losses": steps.differences_of_losses(turns(uncompiled, small, 1, 0.0).losses),
    }


def make_work(size: argparse.Namespace, ratio: float, what: str) -> Callable[[], None]:
    """``step`` or ``anchor``, finished on the device when it returns."""
    torch.set_num_threads(size.threads)
    keep_freed_memory()
    step = Step(size, ratio, size.amp)
    step.step()  # allocates the optimiser's state

    def work() -> None:
        getattr(step, what)()
        if step.device.type == "cuda":
            torch.cuda.synchronize()

    return work


def measure(size: argparse.Namespace) -> list[dict]:
    jobs = [(ratio, what) for ratio in RATIOS for what in ("step", "anchor")]
    processes = {job: InProcess(make_work, size, *job, device=size.device) for job in jobs}
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
    steps.add_flags(parser)
    parser.add_argument("--model_name", default="deit_small")
    parser.add_argument("--rand_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--amp", default="fp32", help="of the table of masks")
    parser.set_defaults(threads=os.cpu_count())
    size = parser.parse_args()
    plain = beside_plain(size)
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
    finish(size, plain | {"rows": rows})


if __name__ == "__main__":
    main()
