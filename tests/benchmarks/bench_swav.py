"""Time and peak memory of one SwAV training step: ResNet-50, 4 images, 2 x 224 + 6 x 96 pixels, 3,000 prototypes.

    python tests/benchmarks/bench_swav.py [--threads 2] [--rounds 5] [--compile] [--out FILE.json]
    python tests/benchmarks/bench_swav.py --device cuda --batch 64

The kinds of step are those of ``steps.py``. ``plain`` is the step as a textbook writes it (this file): torchvision's
ResNet, one pass per resolution, Sinkhorn-Knopp on a K x B matrix, a loop over the other crops, a loop over parameters
around torch's SGD for LARC. ``ours`` is ``train_one_epoch`` of ``swav/main_swav.py``.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import shared.run.passive_threads  # noqa: F401
from shared.networks.compiling import compile_network
from shared.optimisation.larc import LARC
from shared.run.memory import keep_freed_memory
from swav.hub import build_network
from swav.losses import EmbeddingQueue, PrototypeUsage, SwappedPrediction
from swav.main_swav import train_one_epoch
from tests.benchmarks import steps
from tests.benchmarks.harness import finish, get_args_parser

LR, WEIGHT_DECAY, TRUST, TEMPERATURE, EPSILON, ITERATIONS, HIDDEN, DIM = 0.1, 1e-6, 0.001, 0.1, 0.05, 3, 2048, 128


class PlainNetwork(nn.Module):
    def __init__(self, prototypes: int):
        super().__init__()
        self.trunk = torchvision.models.resnet50()
        self.trunk.fc = nn.Identity()
        layers = nn.Linear(2048, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, DIM)
        self.projection_head = nn.Sequential(*layers)
        self.prototypes = nn.Linear(DIM, prototypes, bias=False)

    def forward(self, views: list[Tensor]) -> Tensor:
        features = torch.cat([self.trunk(batch) for batch in views])
        return self.prototypes(F.normalize(self.projection_head(features), dim=1))


class PlainStep:
    def __init__(self, size: argparse.Namespace, amp: str):
        self.size, self.network = size, PlainNetwork(size.prototypes).to(size.device)
        self.autocast = torch.autocast(size.device, torch.bfloat16, enabled=amp == "bf16")

    def start(self, state: dict[str, Tensor]) -> None:
        heads = ("projection_head", "prototypes")
        self.network.load_state_dict({n if n.startswith(heads) else f"trunk.{n}": value for n, value in state.items()})
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=LR, momentum=0.9)

    def __call__(self, views: list[Tensor]) -> float:
        with torch.no_grad():
            prototypes = self.network.prototypes.weight
            prototypes.copy_(F.normalize(prototypes, dim=1))
        with self.autocast:
            scores = self.network(views)
        scores = scores.float().chunk(2 + self.size.small_crops)
        loss = 0
        for i in range(2):
            codes = self.codes(scores[i].detach())
            others = [s for j, s in enumerate(scores) if j != i]
            loss -= sum((codes * F.log_softmax(s / TEMPERATURE, dim=1)).sum(dim=1).mean() for s in others) / len(others)
        loss = loss / 2
        self.optimizer.zero_grad()
        loss.backward()
        for p in self.network.parameters():
            p_norm, g_norm = p.data.norm(), p.grad.norm()
            if p_norm != 0 and g_norm != 0:
                rate = TRUST * p_norm / (g_norm + WEIGHT_DECAY * p_norm + 1e-8)
                p.grad.add_(p.data, alpha=WEIGHT_DECAY).mul_(rate)
        self.optimizer.step()
        return loss.item()

    @staticmethod
    def codes(scores: Tensor) -> Tensor:
        q = torch.exp(scores / EPSILON).T
        q = q / q.sum()
        for _ in range(ITERATIONS):
            q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
            q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
        return (q * q.shape[1]).T


class OurStep:
    def __init__(self, size: argparse.Namespace, amp: str, compiled: bool = False):
        self.size, self.amp, self.device = size, amp, torch.device(size.device)
        self.network = self.build(size).to(self.device)
        self.criterion = SwappedPrediction((0, 1), TEMPERATURE, EPSILON, ITERATIONS)
        self.queue = EmbeddingQueue(2, 0, DIM, self.device)
        self.usage = PrototypeUsage(size.prototypes, self.device)
        if compiled:
            compile_network(self.network)

    @staticmethod
    def build(size: argparse.Namespace) -> nn.Module:
        heads = {"output_dim": DIM, "hidden_mlp": HIDDEN, "nmb_prototypes": size.prototypes}
        return build_network("resnet50", **heads, normalize=True)

    def start(self, state: dict[str, Tensor]) -> None:
        self.network.load_state_dict(state)
        self.optimizer = LARC(self.network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, trust_coefficient=TRUST)
        self.run = steps.StepRun(self.amp, self.device)

    def __call__(self, views: list[Tensor]) -> float:
        loader = [(views, torch.zeros(self.size.batch), torch.arange(self.size.batch))]
        train_one_epoch(
            self.network,
            self.criterion,
            self.queue,
            self.usage,
            loader,
            self.optimizer,
            np.full(steps.STEPS, LR),
            self.run,
            freeze_prototypes_niters=0,
        )
        return self.run.last_loss


def make_views(size: argparse.Namespace) -> list[Tensor]:
    shapes = [(2 * size.batch, size.large_px), (size.small_crops * size.batch, size.small_px)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, side, side, generator=generator).to(size.device) for n, side in shapes]


def make_step(kind: str, size: argparse.Namespace, weights: str) -> Callable[[], float]:
    """A step on the same views again and again, from the stored weights; it gives the loss: the device has finished."""
    amp = steps.precision_of(kind)
    if kind.startswith("plain"):
        step = PlainStep(size, amp)
    else:
        keep_freed_memory()
        step = OurStep(size, amp, kind.endswith("compiled"))
    step.start(torch.load(weights, weights_only=True, mmap=True))
    views = make_views(size)
    return lambda: step(views)


def count_operations(size: argparse.Namespace) -> int:
    """Floating-point operations of the products and convolutions of a plain step."""
    small = argparse.Namespace(**(vars(size) | {"batch": 2, "device": "cpu"}))
    step = PlainStep(small, "fp32")
    step.start(OurStep.build(small).state_dict())
    with FlopCounterMode(display=False) as counter:
        step(make_views(small))
    return size.batch * counter.get_total_flops() // 2


def turns(kinds: list[str], size: argparse.Namespace, rounds: int) -> steps.Turns:
    """Steps of every kind in turns, from the same weights."""
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.manual_seed(0)
        torch.save(OurStep.build(size).state_dict(), file.name)
        return steps.take_turns(make_step, kinds, size, rounds, file.name)


def check_equal_losses(size: argparse.Namespace, kinds: list[str]) -> dict:
    """Losses of three steps from the same weights, on small inputs.

    In float32 the gradients of a random ResNet-50 are 1 to 3 % off those of float64, in either layout of the images.
    """
    small = {"batch": 4, "large_px": 64, "small_px": 32, "small_crops": 2, "prototypes": 300, "launches": False}
    found = turns(kinds, argparse.Namespace(**(vars(size) | small)), 1)
    return steps.differences_of_losses(found.losses, tolerance=5e-3)


def main() -> None:
    parser = get_args_parser(__doc__, rounds=5)
    steps.add_flags(parser)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--large_px", type=int, default=224)
    parser.add_argument("--small_px", type=int, default=96)
    parser.add_argument("--small_crops", type=int, default=6)
    parser.add_argument("--prototypes", type=int, default=3000)
    size = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in vars(size).items()), flush=True)
    kinds = steps.kinds_of(size)
    found = turns([*kinds, *steps.products_of(kinds)], size, size.rounds)
    rows = steps.compare_steps(found, count_operations(size), size.batch)
    losses = check_equal_losses(size, [kind for kind in kinds if not kind.endswith("compiled")])
    finish(size, {"relative_difference_of_losses": losses, "steps": rows}, packages=(torch, torchvision))


if __name__ == "__main__":
    main()
