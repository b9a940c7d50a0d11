"""A small network of every folder that has a card."""

import importlib
from pathlib import Path

import torch
from torch import nn

from shared.networks.card import Card

CARDS = [file.parent.name for file in Path(__file__).parents[1].glob("*/hub.py") if "CARD = Card(" in file.read_text()]
# architecture and arguments of the card's ``build``, as each ``tests/<method>/tiny.py`` states them
SMALL = {method: importlib.import_module(f"tests.{method}.tiny").SMALL_NETWORK for method in CARDS}


def card_of(method: str) -> Card:
    return importlib.import_module(f"{method}.hub").CARD


def small_network(method: str, seed: int = 0) -> nn.Module:
    """Without a head, in evaluation mode, with weights and running statistics that do something."""
    arch, options = SMALL[method]
    torch.manual_seed(seed)
    network = card_of(method).build(arch, **options)
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not value.any():
            value.normal_(std=0.1)
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return network.eval().requires_grad_(False)
