"""A moving average of a whole network: parameters and running statistics."""

import copy

import torch
from torch import nn

from shared.optimisation.optim import ema_update_


class NetworkEMA:
    """``average = decay * average + (1 - decay) * network`` after every step, for every floating-point entry.

    Counters are copied. Starts as a copy of the network. A part of checkpoints, see :meth:`shared.run.run.Run.resume`.

    Args:
        device: Where the average is kept; None: where the network is.
    """

    def __init__(self, network: nn.Module, decay: float, device: torch.device | str | None = None):
        self.network = copy.deepcopy(network).to(device).eval().requires_grad_(False)
        self.decay = decay
        self.state_dict, self.load_state_dict = self.network.state_dict, self.network.load_state_dict

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        pairs = list(zip(self.network.state_dict().values(), network.state_dict().values(), strict=True))
        floats = [(mine, value.to(mine.device)) for mine, value in pairs if mine.is_floating_point()]
        ema_update_(*zip(*floats, strict=True), self.decay)
        for mine, value in pairs:
            if not mine.is_floating_point():
                mine.copy_(value)
