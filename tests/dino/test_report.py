"""Collapse diagnostics where a small network really collapses, and commands that scripts understand."""

import copy

import torch
from torch import nn

from dino.losses import DINOLoss
from dino.main_dino import output_health, parse_args
from dino.report import health_rules
from dino.vision_transformer import DINOHead
from shared.optimisation.optim import ema_update_
from shared.run.health import HealthMonitor

K = 64


def monitor_of(flags: str = "", steps_per_epoch: int = 10) -> HealthMonitor:
    """Of a run of 20 epochs, two of them warm-up: verdicts after 50 steps, some after 70."""
    args = parse_args(["--data_path", "x", *"--epochs 20 --warmup_epochs 2".split(), *flags.split()])
    return HealthMonitor(health_rules(args, steps_per_epoch))


def train(steps: int = 150, center_momentum: float = 0.9, teacher_temp: float = 0.04, momentum: float = 0.9) -> str:
    """DINO without images, on noisy copies of points of 16 clusters; what is said of it."""
    torch.manual_seed(0)
    clusters = torch.randn(16, 32)
    head = DINOHead(32, K, hidden_dim=64, bottleneck_dim=16)
    student = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    teacher, teacher_head = copy.deepcopy(student), copy.deepcopy(head)
    parameters = [*student.parameters(), *head.parameters()]
    averages = [*teacher.parameters(), *teacher_head.parameters()]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=3e-3)
    criterion = DINOLoss(K, 2, teacher_temp, teacher_temp, 0, 1, center_momentum=center_momentum)
    flags = {"momentum_teacher": momentum, "teacher_temp": teacher_temp, "warmup_teacher_temp": teacher_temp}
    monitor = monitor_of(" ".join(f"--{name} {value}" for name, value in flags.items()))
    for step in range(steps):
        points = clusters[torch.randint(16, (64,))].repeat(2, 1)
        views = points + 0.3 * torch.randn_like(points)
        with torch.no_grad():
            features = teacher(views)
            teacher_logits = teacher_head(features)
        loss = criterion(head(student(views)), teacher_logits, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update_(averages, parameters, momentum)
        health = output_health(criterion, loss, features)
        monitor.check({name: float(value) for name, value in health.items()} | {"step": step, "loss": loss.item()})
    return "\n".join(monitor.warnings.values())


def test_a_run_that_learns_is_healthy():
    assert train() == ""


def test_without_centring_the_teacher_gives_one_output():
    sentence = train(center_momentum=1.0)
    assert "COLLAPSE: the teacher gives every image the same output" in sentence and "--center_momentum" in sentence


def test_without_sharpening_the_output_is_uniform():
    sentence = train(teacher_temp=1.0)
    assert "COLLAPSE: the teacher's output is uniform" in sentence and "--teacher_temp" in sentence


def test_without_a_momentum_teacher_that_is_what_is_named():
    """Its temperature is below the safe one, and its centre moves: neither is at fault."""
    sentence = train(momentum=0.0, teacher_temp=0.012)
    assert "COLLAPSE: the teacher gives every image the same output" in sentence
    assert "raise --momentum_teacher" in sentence and "--teacher_temp" not in sentence
