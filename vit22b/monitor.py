"""Do the attention logits run away? The largest logit and the entropy of the attention, block by block (section 2.1).

Without normalised queries and keys logits grow until every query looks at one token only, and training diverges.
"""

import contextlib
import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from shared import distributed
from shared.run.health import HealthRule, twice_in_a_row

from .scaled_vit import Attend, ScaledViT

IMAGES = 8  # of a process that are looked at


def logits_and_entropy(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries and keys (B, heads, N, d): the largest absolute logit, and the mean entropy in nats (0-d).

    Logits are those of the softmax, QK^T / sqrt(d).
    """
    logits = (q.float() @ k.float().transpose(-2, -1)) * q.shape[-1] ** -0.5
    return logits.abs().amax(), torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1).mean()


class AttentionMonitor:
    """Looks into the blocks of a network while it is called."""

    def __init__(self, network: ScaledViT):
        self.modules: list[Attend] = [block.attend for block in network.blocks]
        self.found: dict[int, tuple[Tensor, Tensor]] = {}
        self.tokens = 1

    @contextlib.contextmanager
    def watching(self, wanted: bool = True) -> Iterator[None]:
        """Measure the call in here, of the first images; nothing unless ``wanted``."""
        modules = enumerate(self.modules if wanted else [])
        hooks = [module.register_forward_pre_hook(partial(self._look, i)) for i, module in modules]
        eager = torch.compiler.set_stance("force_eager") if wanted else contextlib.nullcontext()
        try:
            with eager:  # compiled code has no modules
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _look(self, block: int, module: Attend, args: tuple[Tensor, Tensor, Tensor]) -> None:
        with torch.autocast(args[0].device.type, enabled=False):
            self.found[block] = logits_and_entropy(args[0][:IMAGES], args[1][:IMAGES])
        self.tokens = args[1].shape[-2]

    def values(self) -> dict[str, Tensor | float]:
        """Of the call before, for a line of the log: ``logit_<block>`` and ``entropy_<block>``, largest and least.

        Logits are the largest of all processes; a log averages entropies. Every process must call this.
        """
        if not self.found:
            return {}
        logits, entropies = (
            torch.stack(values) for values in zip(*(self.found[i] for i in range(len(self.modules))), strict=True)
        )
        self.found = {}
        if distributed.get_world_size() > 1:
            dist.all_reduce(logits, op=dist.ReduceOp.MAX)
        values = {"max_logit": logits.max(), "min_entropy": entropies.min(), "ln_n": math.log(self.tokens)}
        values |= {f"logit_{i}": logit for i, logit in enumerate(logits)}
        return values | {f"entropy_{i}": entropy for i, entropy in enumerate(entropies)}


def per_block(line: dict, name: str) -> list[float]:
    """``logit`` or ``entropy`` of each block as a line of the log has them."""
    return [line[f"{name}_{i}"] for i in range(len(line)) if line.get(f"{name}_{i}") is not None]


def health_rules(qk_norm: bool) -> list[HealthRule]:
    """Logits that ran away: beyond 100, and attention that has lost nine tenths of its entropy."""
    advice = "lower --lr" if qk_norm else "train with --qk_norm true, or lower --lr"
    sentence = (
        "attention logits run away (the largest is {max_logit:.0f}, the least entropy of a block {min_entropy:.3f} of "
        f"ln N = {{ln_n:.2f}}): {advice}"
    )

    def ran_away(line: dict) -> bool:
        return line.get("max_logit", 0) > 100 and line["min_entropy"] < 0.1 * line["ln_n"]

    return [HealthRule("logits", twice_in_a_row(ran_away), sentence)]
