"""Both ways to collapse, seen by the monitor where a small network really collapses, and nothing said where not."""

import copy
import math

import pytest
import torch
from torch import nn

from dino.collapse import CollapseMonitor
from dino.losses import DINOLoss
from dino.main_dino import output_health
from dino.vision_transformer import DINOHead
from shared.optimisation.optim import ema_update_

K = 64
HEALTHY = {"step": 100, "teacher_entropy": 2.0, "kl": 0.5, "feature_spread": 0.9, "loss": 2.5}


def train(steps: int = 150, center_momentum: float = 0.9, teacher_temp: float = 0.04) -> list[str]:
    """DINO without images, on noisy copies of points of 16 clusters; what the monitor said."""
    torch.manual_seed(0)
    clusters = torch.randn(16, 32)
    head = DINOHead(32, K, hidden_dim=64, bottleneck_dim=16)
    student = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    teacher, teacher_head = copy.deepcopy(student), copy.deepcopy(head)
    parameters = [*student.parameters(), *head.parameters()]
    averages = [*teacher.parameters(), *teacher_head.parameters()]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=3e-3)
    criterion = DINOLoss(K, 2, teacher_temp, teacher_temp, 0, 1, center_momentum=center_momentum)
    monitor = CollapseMonitor(K, patience_steps=steps // 2)
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
        ema_update_(averages, parameters, 0.9)
        health = output_health(criterion, loss, features)
        monitor.check({name: float(value) for name, value in health.items()} | {"step": step, "loss": loss.item()})
    return list(monitor.warnings.values())


def test_nothing_is_said_of_a_run_that_learns():
    assert train() == []


def test_without_centring_the_teacher_gives_one_output_and_the_flag_is_named():
    (sentence, *_) = train(center_momentum=1.0)
    assert "COLLAPSE: the teacher gives every image the same output" in sentence and "--center_momentum" in sentence


def test_without_sharpening_the_output_is_uniform_and_the_flag_is_named():
    (sentence, *_) = train(teacher_temp=1.0)
    assert "COLLAPSE: the teacher's output is uniform" in sentence and "--teacher_temp" in sentence


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ({"teacher_entropy": math.log(K), "kl": 0.0}, "--teacher_temp"),
        ({"teacher_entropy": 0.0, "kl": 0.0}, "--center_momentum"),
        ({"feature_spread": 0.001}, "--lr"),
        ({"loss": math.log(K)}, "--momentum_teacher"),
    ],
)
def test_each_failure_is_said_once_and_only_after_the_patience(line, flag):
    monitor = CollapseMonitor(K, patience_steps=50)
    assert monitor.check(HEALTHY | line | {"step": 49}) is None
    assert flag in monitor.check(HEALTHY | line)
    assert monitor.check(HEALTHY | line) is None


def test_what_a_slow_start_looks_like_is_said_after_the_warm_up_only():
    monitor = CollapseMonitor(K, patience_steps=50, warmup_steps=200)
    uniform = HEALTHY | {"teacher_entropy": math.log(K), "kl": 0.0, "loss": math.log(K)}
    assert monitor.check(uniform | {"step": 249}) is None
    assert "--center_momentum" in monitor.check(HEALTHY | {"teacher_entropy": 0.0, "kl": 0.0, "step": 60})
    assert "--teacher_temp" in monitor.check(uniform | {"step": 250})


def test_a_healthy_line_and_one_without_finite_steps_say_nothing():
    monitor = CollapseMonitor(K, patience_steps=0)
    assert monitor.check(HEALTHY) is None
    assert monitor.check(dict.fromkeys(HEALTHY, math.nan)) is None
