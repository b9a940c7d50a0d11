"""Time and peak memory of one supervised training step: XCiT-S12/16, 8 images of 224 pixels, Mixup and CutMix.

    python tests/benchmarks/bench_supervised.py [--threads 2] [--rounds 5] [--compile] [--out FILE.json]
    python tests/benchmarks/bench_supervised.py --device cuda --batch 128 --network resmlp_12

The kinds of step are those of ``steps.py``. ``plain`` is the step as a textbook writes it (this file) around timm's
network. ``ours`` is ``train_one_epoch`` of ``shared/supervised/train.py``, with the recipe of ``xcit/main.py`` and
``resmlp/main.py``: Mixup or CutMix of the batch, cross-entropy, AdamW.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import resmlp.hub
import shared.run.passive_threads  # noqa: F401
import xcit.hub
from resmlp.resmlp_models import ARCHITECTURES
from shared.networks.compiling import compile_network
from shared.run.memory import keep_freed_memory
from shared.supervised.losses import ClassificationLoss
from shared.supervised.optimizer import build_timm_optimizer
from shared.supervised.train import train_one_epoch
from tests.benchmarks import steps
from tests.benchmarks.harness import finish, get_args_parser
from xcit.cross_covariance_transformer import build_xcit

LR, WEIGHT_DECAY, CLASSES = 5e-4, 0.05, 1000
NETWORKS = {  # ours, timm's, and the names of timm's weights
    "xcit_small_12_p16": (partial(build_xcit, "xcit_small_12_p16"), "xcit_small_12_p16_224", xcit.hub.to_timm),
    "resmlp_12": (ARCHITECTURES["resmlp_12"], "resmlp_12_224", resmlp.hub.to_timm),
}


class PlainStep:
    def __init__(self, size: argparse.Namespace, amp: str, state: dict[str, Tensor]):
        _, name, to_timm = NETWORKS[size.network]
        self.network = timm.create_model(name)
        self.network.load_state_dict(to_timm(state))
        self.network.to(size.device)
        decayed = [p for p in self.network.parameters() if p.ndim > 1]
        others = [p for p in self.network.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR)
        self.autocast = torch.autocast(size.device, torch.bfloat16, enabled=amp == "bf16")

    def __call__(self, images: Tensor, labels: Tensor, mixup: Callable) -> float:
        images, targets = mixup(images, labels)
        with self.autocast:
            loss = torch.sum(-targets * F.log_softmax(self.network(images), dim=-1), dim=-1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class OurStep:
    def __init__(self, size: argparse.Namespace, amp: str, state: dict[str, Tensor], compiled: bool):
        self.network = NETWORKS[size.network][0]()
        self.network.load_state_dict(state)
        self.network.to(size.device)
        if compiled:
            compile_network(self.network)
        self.optimizer = build_timm_optimizer(self.network, "adamw", LR, WEIGHT_DECAY)
        self.run = steps.StepRun(amp, size.device)

    def __call__(self, images: Tensor, labels: Tensor, mixup: Callable) -> float:
        loader, loss = [(images, labels, None)], ClassificationLoss()
        train_one_epoch(self.run, self.network, loss, loader, mixup, self.optimizer, LR, None, None)
        return self.run.last_loss


def make_step(kind: str, size: argparse.Namespace, weights: str) -> Callable[[], float]:
    """A step on the same images again and again, mixed alike, from the stored weights; it gives the loss."""
    amp, state = steps.precision_of(kind), torch.load(weights, weights_only=True)
    if kind.startswith("plain"):
        step = PlainStep(size, amp, state)
    else:
        keep_freed_memory()
        step = OurStep(size, amp, state, kind.endswith("compiled"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size.batch, 3, size.side, size.side, generator=generator).to(size.device)
    labels = torch.randint(CLASSES, (size.batch,), generator=generator).to(size.device)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)

    def mix(*batch: Tensor) -> tuple[Tensor, Tensor]:
        np.random.seed(0)  # ours draws anew for every step
        return mixup(*batch)

    return lambda: step(images.clone(), labels, mix)  # Mixup writes into the images


def count_operations(size: argparse.Namespace, weights: str) -> int:
    """Floating-point operations of the products and convolutions of a plain step."""
    small = argparse.Namespace(**(vars(size) | {"batch": 2, "device": "cpu"}))
    step = make_step("plain", small, weights)
    with FlopCounterMode(display=False) as counter:
        step()
    return size.batch * counter.get_total_flops() // 2


def main() -> None:
    parser = get_args_parser(__doc__, rounds=5)
    steps.add_flags(parser)
    parser.add_argument("--network", default="xcit_small_12_p16", choices=tuple(NETWORKS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=224)
    size = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in vars(size).items()), flush=True)
    kinds = steps.kinds_of(size)
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.manual_seed(0)
        torch.save(NETWORKS[size.network][0]().state_dict(), file.name)
        found = steps.take_turns(make_step, [*kinds, *steps.products_of(kinds)], size, size.rounds, file.name)
        operations = count_operations(size, file.name)
    rows = steps.compare_steps(found, operations, size.batch)
    losses = {kind: values for kind, values in found.losses.items() if not kind.startswith("products")}
    differences = steps.differences_of_losses(losses, tolerance=1e-3)
    finish(size, {"relative_difference_of_losses": differences, "steps": rows}, packages=(torch, timm))


if __name__ == "__main__":
    main()
