"""timm's optimisers and schedules by name."""

import argparse

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

SET_BY_FLAGS = {"weight_decay", "momentum", "eps", "betas"}
FUSED = ("adam", "adamw")  # torch's fused kernels can leave a step out without waiting for it


def build_timm_optimizer(
    network: nn.Module,
    name: str,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    eps: float | None = None,
    betas: tuple[float, ...] | None = None,
) -> torch.optim.Optimizer:
    """timm's optimiser of that name; biases, vectors and ``network.no_weight_decay()`` are not decayed.

    Raises:
        ValueError: If timm has none of that name.
    """
    options = {"eps": eps, "betas": None if betas is None else tuple(betas)}
    options = {key: value for key, value in options.items() if value is not None}
    if name in FUSED:
        options["fused"] = True
    try:
        return create_optimizer_v2(network, name, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)
    except (ValueError, LookupError, TypeError, AssertionError) as error:
        raise ValueError(f"--opt {name}: {error}") from error


def counters_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Options of the groups that a checkpoint restores: the rate, and all that no flag sets, as timm counts there."""
    return tuple({name for group in optimizer.param_groups for name in group} - SET_BY_FLAGS)


def build_timm_schedule(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> Scheduler:
    """timm's learning-rate schedule from the flags of its training script, one value per epoch."""
    if args.sched == "plateau":
        raise ValueError("--sched plateau: a schedule here is a function of the epoch; take cosine, step, poly or tanh")
    scheduler, _ = create_scheduler(args, optimizer)
    if scheduler is None:
        raise ValueError(f"--sched {args.sched} is no schedule of timm")
    return scheduler


def set_learning_rate(scheduler: Scheduler, optimizer: torch.optim.Optimizer, epoch: int) -> float:
    """Write the rate of ``epoch`` into the optimiser and return it.

    The schedule is one epoch late: epoch e trains with its value at e - 1, since the original trainers move it on after
    an epoch by the number of that epoch. Epochs 0 and 1 both have the first value.
    """
    scheduler.step(max(epoch - 1, 0))
    return optimizer.param_groups[0]["lr"]
