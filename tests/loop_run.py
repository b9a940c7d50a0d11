"""A run for one loop of a test or a benchmark."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from shared.optimisation.precision import Precision
from shared.run.health import HealthMonitor
from shared.run.log import RunLog
from shared.run.not_finite import FiniteGuard
from shared.run.run import Run


class LoopRun(Run):
    """The real :class:`Run` without processes, signals and checkpoints; only its log is written.

    Args:
        folder: Of the log and of ``nonfinite.pth``.
        steps_per_epoch: Of the loader that the loop is given.
        epoch: The loop's.
        look: Called after every step; what it returns is kept in ``seen``.
        networks: Searched when gradients stay NaN.
    """

    def __init__(
        self,
        folder: Path,
        steps_per_epoch: int,
        epochs: int = 1,
        epoch: int = 0,
        seed: int = 0,
        amp: str = "fp32",
        device: str = "cpu",
        log_freq: int = 1,
        max_skipped_steps: int = 1,
        look: Callable[[], dict] = dict,
        **networks: nn.Module,
    ):
        self.args = Namespace(seed=seed)
        self.device, self.output_dir = torch.device(device), Path(folder)
        self.precision = Precision(amp, self.device)
        self.data = SimpleNamespace(steps_per_epoch=steps_per_epoch)
        self.epoch, self.total_steps = epoch, epochs * steps_per_epoch
        self.health = HealthMonitor()
        self.log = RunLog(folder, self.total_steps, log_freq, resumed=True)  # it goes on with what is there
        self.guard = FiniteGuard(networks, max_skipped_steps, self.device)
        self.seen: list[dict] = []
        self.checkpointer = SimpleNamespace(
            after_step=lambda epoch, step: self.seen.append(look()), save=lambda epoch, step, name: None
        )
