"""Keeping infinities and NaNs out of a run, and saying where they began.

A step whose gradients are not finite is left out (``step_unless_not_finite``). Here such steps are counted, running
statistics that they have spoilt are put back, and too many in a row end the run.
"""

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from shared import distributed

from .attempt import NotFinite


class FiniteGuard:
    """Counts steps in a row that were left out. Nothing here waits for a GPU unless its docstring says so.

    Args:
        networks: By name, those without parameters left out; running statistics fall back to the last finite ones.
        max_skipped_steps: The run ends at so many steps in a row; 0: never.
        device: Of the gradients.
        in_a_row: Steps that were left out just before a checkpoint from which the run goes on.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        max_skipped_steps: int,
        device: torch.device,
        in_a_row: int = 0,
    ):
        self.networks: dict[str, nn.Module] = {}
        self.max_skipped_steps = max_skipped_steps
        self.in_a_row = torch.tensor(float(in_a_row), device=device)
        self.watch(**networks)

    def watch(self, **networks: nn.Module) -> None:
        """Watch these networks too, or instead of those of the same names."""
        self.networks |= {n: network for n, network in networks.items() if any(True for _ in network.parameters())}
        norms = (m for n in self.networks.values() for m in n.modules() if getattr(m, "track_running_stats", False))
        self.statistics = [b for norm in norms for b in norm.buffers() if b.is_floating_point()]
        self.good_statistics = [b.clone() for b in self.statistics]

    @torch.no_grad()
    def count(self, skipped: Tensor) -> None:
        """Take note of a step: ``skipped`` is 1.0 if it was left out, else 0.0 (0-d)."""
        self.in_a_row = (self.in_a_row + skipped) * skipped
        if self.statistics:
            finite = torch.stack(torch._foreach_norm(self.statistics, ord=torch.inf)).isfinite().all()
            good = [torch.where(finite, b, g) for b, g in zip(self.statistics, self.good_statistics, strict=True)]
            torch._foreach_copy_(self.statistics, good)
            self.good_statistics = good

    def is_good(self) -> bool:
        """Whether the last step was an update. Waits for the device."""
        return self.in_a_row.item() == 0

    def too_many(self) -> bool:
        """Whether the run has to end. Waits for the device."""
        return 0 < self.max_skipped_steps <= self.in_a_row.item()


class NonFiniteSearch:
    """Watches one repeated step for the first tensor that is not finite.

    Args:
        networks: By name; every module of theirs is watched.
        path: File for the batch and the name of the tensor.
    """

    def __init__(self, networks: dict[str, nn.Module], path: Path):
        self.networks, self.path = networks, path
        self.found: list[str] = []

    @contextlib.contextmanager
    def of(self, position: dict[str, int], batch) -> Iterator[None]:
        """Around the step at ``position`` (epoch and step), which has loaded ``batch``."""
        self.position, self.batch = position, batch
        hooks = []
        for name, network in self.networks.items():
            for module_name, module in network.named_modules():
                full_name = f"{name}.{module_name}" if module_name else name
                hooks.append(module.register_forward_pre_hook(partial(self._see_input, full_name)))
                hooks.append(module.register_forward_hook(partial(self._see_output, full_name)))
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled code has no modules
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see_input(self, name: str, module: nn.Module, args: tuple) -> None:
        if not self.found and not _all_finite(args):
            self.found.append(f"the input of {name}")

    def _see_output(self, name: str, module: nn.Module, args: tuple, output) -> None:
        if not self.found and not _all_finite(output):
            self.found.append(name)

    def see_loss(self, loss: Tensor) -> None:
        if not self.found and not loss.isfinite():
            self.found.append("the loss")

    def stop(self, in_a_row: int) -> NoReturn:
        """Save the batch and the name of the tensor, and end the run. Every process calls this.

        Raises:
            NotFinite: Always.
        """
        found = distributed.all_gather_object(next(iter(self.found), None))
        rank = next((rank for rank, name in enumerate(found) if name is not None), 0)
        # gradients are summed over processes, so they cannot tell where it began
        name = found[rank] or next(self._gradients(), "nothing when the step is repeated")
        where = f"the batch is in {self.path}"
        if distributed.get_rank() == rank:
            batch = self.batch if isinstance(self.batch, dict) else {"batch": self.batch}
            try:
                torch.save({**batch, **self.position, "rank": rank, "first_not_finite": name}, self.path)
            except (OSError, RuntimeError) as error:  # a full disk must not hide why the run ends
                where = f"the batch could not be saved to {self.path}: {error}"
        where = distributed.broadcast_object(where, src=rank)
        raise NotFinite(
            f"{in_a_row} steps in a row, up to step {self.position['step'] + 1}, had gradients that are not finite; "
            f"the first such tensor is {name} (rank {rank}), {where}; the weights are those of the last "
            "good checkpoint, from which the same command goes on"
        )

    def _gradients(self) -> Iterator[str]:
        for name, network in self.networks.items():
            for parameter_name, p in reversed(list(network.named_parameters())):  # the backward pass comes from the end
                if p.grad is not None and not p.grad.isfinite().all():
                    yield f"the gradient of {name}.{parameter_name}"


def _all_finite(value) -> bool:
    return all(t.isfinite().all() for t in _tensors(value))


def _tensors(value) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, list | tuple) else []
