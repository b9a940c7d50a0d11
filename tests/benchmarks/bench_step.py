"""Time and peak memory of one DINO training step: ViT-S/16, 8 images, 2 x 224 + 8 x 96 pixels, 65,536 outputs.

    python tests/benchmarks/bench_step.py [--threads 2] [--rounds 5] [--compile] [--out FILE.json]
    python tests/benchmarks/bench_step.py --growth             # cost against crops, batch, image side and outputs
    python tests/benchmarks/bench_step.py --device cuda --batch 64

The kinds of step are those of ``steps.py``. ``plain`` is the step as a textbook writes it (this file): one pass per
resolution, explicit attention matrices, ``nn.utils.weight_norm``, a loop over pairs of crops, loops over parameters for
clipping, AdamW and the teacher. ``ours`` is ``train_one_epoch`` of ``dino/main_dino.py``.
"""

import argparse
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import shared.run.passive_threads  # noqa: F401
from dino.hub import build_backbone
from dino.losses import DINOLoss
from dino.main_dino import Schedules, train_one_epoch
from dino.vision_transformer import DINOHead
from shared.multicrop import MultiCropWrapper
from shared.networks.compiling import compile_network
from shared.optimisation.accumulation import accumulate
from shared.optimisation.optim import build_optimizer, param_groups_no_decay_on_bias_and_norm
from shared.optimisation.precision import fast_bf16
from shared.optimisation.schedules import cosine_schedule
from shared.pictures.curves import Curve, Panel, save_panels
from shared.run.memory import keep_freed_memory
from tests.benchmarks import steps
from tests.benchmarks.harness import finish, get_args_parser

LR, WEIGHT_DECAY, MOMENTUM, CLIP = 1e-4, 0.04, 0.996, 3.0


class PlainAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        attention = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(B, N, D))


class PlainBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = PlainAttention(dim, num_heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))

    def drop(self, x: Tensor) -> Tensor:
        if self.drop_path == 0 or not self.training:
            return x
        keep = 1 - self.drop_path
        return x.div(keep) * torch.floor(keep + torch.rand(len(x), 1, 1, device=x.device))


class PlainViT(nn.Module):
    def __init__(self, patch_size: int, dim: int, num_heads: int, side_px: int, drop_path_rate: float):
        super().__init__()
        self.patch_size = patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (side_px // patch_size) ** 2, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        rates = torch.linspace(0, drop_path_rate, 12).tolist()
        self.blocks = nn.Sequential(*[PlainBlock(dim, num_heads, rate) for rate in rates])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1)
        return self.norm(self.blocks(tokens + self.positions(x.shape[-1])))[:, 0]

    def positions(self, side_px: int) -> Tensor:
        stored, side = math.isqrt(self.pos_embed.shape[1] - 1), side_px // self.patch_size
        if side == stored:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, stored, stored, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=(side + 0.1) / stored, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.permute(0, 2, 3, 1).reshape(1, side**2, -1)], dim=1)


class PlainHead(nn.Module):
    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        hidden = [nn.Linear(dim, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256)]
        self.mlp = nn.Sequential(*hidden)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, and what people run
            self.last_layer = nn.utils.weight_norm(nn.Linear(256, out_dim, bias=False))
        self.last_layer.weight_g.data.fill_(1)
        self.last_layer.weight_g.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class PlainNetwork(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: list[Tensor]) -> Tensor:
        return self.head(torch.cat([self.backbone(batch) for batch in views]))


class PlainStep:
    def __init__(self, size: argparse.Namespace, drop_path_rate: float, amp: str):
        dim, num_heads = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}[size.arch]
        self.student, self.teacher = (
            PlainNetwork(PlainViT(size.patch_size, dim, num_heads, size.global_px, rate), PlainHead(dim, size.out_dim))
            for rate in (drop_path_rate, 0.0)
        )
        self.student.to(size.device)
        self.teacher.to(size.device)
        self.num_crops = 2 + size.local_crops
        self.center = torch.zeros(1, size.out_dim, device=size.device)
        self.autocast = torch.autocast(size.device, torch.bfloat16, enabled=amp == "bf16")

    def start(self, state: dict[str, Tensor]) -> None:
        self.student.load_state_dict(state)
        self.teacher.load_state_dict(state)
        self.teacher.requires_grad_(False)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR)

    def __call__(self, views: list[Tensor]) -> float:
        with self.autocast:
            student_logits = self.student(views)
            teacher_logits = self.teacher(views[:1])
            loss = self.loss(student_logits, teacher_logits)
        self.center = 0.9 * self.center + 0.1 * teacher_logits.mean(dim=0, keepdim=True)
        self.optimizer.zero_grad()
        loss.backward()
        for p in self.student.parameters():
            if p.grad is not None:
                coefficient = CLIP / (p.grad.norm() + 1e-6)
                if coefficient < 1:
                    p.grad.mul_(coefficient)
        self.optimizer.step()
        with torch.no_grad():
            for p, average in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                average.mul_(MOMENTUM).add_((1 - MOMENTUM) * p)
        return loss.item()

    def loss(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        student = (student_logits / 0.1).chunk(self.num_crops)
        teacher = F.softmax((teacher_logits - self.center) / 0.04, dim=-1).detach().chunk(2)
        total, pairs = 0, 0
        for i, q in enumerate(teacher):
            for v, s in enumerate(student):
                if v != i:
                    total = total + torch.sum(-q * F.log_softmax(s, dim=-1), dim=-1).mean()
                    pairs += 1
        return total / pairs


class OurStep:
    def __init__(self, size: argparse.Namespace, drop_path_rate: float, amp: str, compiled: bool = False):
        self.device = torch.device(size.device)
        self.student, self.teacher = (self.build(size, rate).to(self.device) for rate in (drop_path_rate, 0.0))
        self.criterion = DINOLoss(size.out_dim, 2 + size.local_crops, 0.04, 0.04, 0, 1).to(self.device)
        self.amp = amp
        if compiled:
            compile_network(self.student.backbone)
            compile_network(self.teacher.backbone)
        accumulate(self.student.backbone, size.accumulate)

    @staticmethod
    def build(size: argparse.Namespace, drop_path_rate: float) -> MultiCropWrapper:
        backbone, dim = build_backbone(size.arch, size.patch_size, drop_path_rate, img_size=size.global_px)
        return MultiCropWrapper(backbone, DINOHead(dim, size.out_dim))

    def start(self, state: dict[str, Tensor]) -> None:
        self.student.load_state_dict(state)
        self.teacher.load_state_dict(state)
        self.teacher.requires_grad_(False)
        self.optimizer = build_optimizer("adamw", param_groups_no_decay_on_bias_and_norm(self.student))
        self.schedules = Schedules(
            *(cosine_schedule(value, value, 1, steps.STEPS) for value in (LR, WEIGHT_DECAY, MOMENTUM))
        )
        self.run = steps.StepRun(self.amp, self.device)

    def __call__(self, views: list[Tensor]) -> float:
        batch = len(views[0]) // 2
        train_one_epoch(
            self.student,
            self.teacher,
            self.criterion,
            [(views, torch.zeros(batch), torch.arange(batch))],
            self.optimizer,
            self.schedules,
            self.run,
            clip_grad=CLIP,
            freeze_last_layer=0,
        )
        return self.run.last_loss


def make_views(size: argparse.Namespace) -> list[Tensor]:
    shapes = [(2 * size.batch, size.global_px), (size.local_crops * size.batch, size.local_px)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, side, side, generator=generator).to(size.device) for n, side in shapes if n]


def make_step(kind: str, size: argparse.Namespace, drop_path_rate: float, weights: str) -> Callable[[], float]:
    """A step on the same views again and again, from the stored weights; it gives the loss: the device has finished."""
    amp = steps.precision_of(kind)
    if kind.startswith("plain"):
        step = PlainStep(size, drop_path_rate, amp)
    else:
        keep_freed_memory()
        step = OurStep(size, drop_path_rate, amp, kind.endswith("compiled"))
    step.start(torch.load(weights, weights_only=True, mmap=True))
    views = make_views(size)
    return lambda: step(views)


def count_operations(size: argparse.Namespace) -> int:
    """Floating-point operations of the products of a plain step."""
    small = argparse.Namespace(**(vars(size) | {"batch": 1, "device": "cpu"}))
    step = PlainStep(small, 0.0, "fp32")
    step.start(step.student.state_dict())
    with FlopCounterMode(display=False) as counter:
        step(make_views(small))
    return size.batch * counter.get_total_flops()


def turns(kinds: list[str], size: argparse.Namespace, rounds: int, drop_path_rate: float) -> steps.Turns:
    """Steps of every kind in turns, from the same weights."""
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.manual_seed(0)
        torch.save(OurStep.build(size, 0.0).state_dict(), file.name)
        return steps.take_turns(make_step, kinds, size, rounds, drop_path_rate, file.name)


def check_equal_losses(size: argparse.Namespace, kinds: list[str]) -> dict:
    """Losses of three steps from the same weights, without stochastic depth and on small inputs."""
    small = argparse.Namespace(**(vars(size) | {"arch": "vit_tiny", "batch": 2, "out_dim": 1024, "local_crops": 2}))
    small.launches = False
    return steps.differences_of_losses(turns(kinds, small, 1, drop_path_rate=0.0).losses)


def growth(size: argparse.Namespace) -> list[dict]:
    """Our step when one size changes and the others stay."""
    changes = {
        "local_crops": (0, 2, 4, 8),
        "batch": (2, 4, 8),
        "global_px": (160, 224, 288),
        "out_dim": (1024, 16384, 65536),
        "threads": (1, 2),
        "accumulate": (1, 2, 4, 8),
    }
    rows, kind = [], "ours-bf16" if fast_bf16(torch.device(size.device)) else "ours"
    print(f"{kind:18} {'images/s':>9} {'peak GiB':>9}")
    for name, values in changes.items():
        if size.growth_of and name not in size.growth_of:
            continue
        for value in values:
            changed = argparse.Namespace(**(vars(size) | {name: value}))
            found = turns([kind], changed, size.rounds, drop_path_rate=0.1)
            images_per_s = changed.batch / min(found.times[kind])
            rows.append(
                {
                    name: value,
                    "images_per_s": images_per_s,
                    "seconds": min(found.times[kind]),
                    "peak_gib": found.peaks[kind],
                }
            )
            print(f"{name:11} {value:6} {images_per_s:9.2f} {found.peaks[kind]:9.2f}", flush=True)
    return rows


SIZE_NAMES = {
    "local_crops": "local crops",
    "batch": "images",
    "global_px": "side of the global crops in pixels",
    "out_dim": "outputs of the head",
    "threads": "threads",
    "accumulate": "--accumulate, pieces of the batch",
}


def draw_growth(rows: list[dict], path: Path, what: str) -> None:
    """Seconds and memory of a step over each size that was changed."""
    panels = []
    for size, name in SIZE_NAMES.items():
        if changed := [row for row in rows if size in row]:
            values = [row[size] for row in changed]
            curves = [
                Curve(values, [row[key] for row in changed], label, "points")
                for key, label in (("seconds", "seconds for a step"), ("peak_gib", "peak memory in GiB"))
            ]
            panels.append(Panel(name, "", "", curves, from_zero=True))
    save_panels(panels, path, f"One DINO step, {what}", rows=2 if len(panels) % 2 == 0 else 1)


def main() -> None:
    parser = get_args_parser(__doc__, rounds=5)
    parser.add_argument("--arch", default="vit_small", choices=("vit_tiny", "vit_small", "vit_base"))
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--global_px", type=int, default=224)
    parser.add_argument("--local_px", type=int, default=96)
    parser.add_argument("--local_crops", type=int, default=8)
    parser.add_argument("--out_dim", type=int, default=65536)
    steps.add_flags(parser)
    parser.add_argument("--accumulate", type=int, default=1, help="pieces in which ours takes the batch")
    parser.add_argument("--picture", type=Path, default=None, help="of --growth")
    parser.add_argument("--growth_of", nargs="+", default=None, help="sizes for --growth; default: all")
    parser.add_argument("--growth", action="store_true", help="measure how the cost grows instead")
    size = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in vars(size).items()), flush=True)
    if size.growth:
        rows = growth(size)
        finish(size, {"growth": rows})
        if size.picture:
            draw_growth(rows, size.picture, f"{size.arch}, patches of {size.patch_size}, one size changed at a time")
        return
    kinds = steps.kinds_of(size)
    found = turns([*kinds, *steps.products_of(kinds)], size, size.rounds, drop_path_rate=0.1)
    rows = steps.compare_steps(found, count_operations(size), size.batch)
    losses = check_equal_losses(size, [kind for kind in kinds if not kind.endswith("compiled")])
    finish(size, {"relative_difference_of_losses": losses, "steps": rows}, steps.targets(rows))


if __name__ == "__main__":
    main()
