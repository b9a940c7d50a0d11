"""Small networks, and files of every layout that the official SwAV code writes, made from them."""

import numpy as np
import torch
from torch import Tensor, nn

from swav import hub, resnet50

NUM_CLASSES = 3
HEADS = {"output_dim": 12, "hidden_mlp": 24, "normalize": True}


def small_resnet50(**options) -> resnet50.ResNet:
    """One block per stage and an eighth of the width: 256 features."""
    return resnet50.ResNet([1, 1, 1, 1], width_per_group=8, **options)


def build_small(monkeypatch) -> None:
    """Let the name ``resnet50`` build the small network."""
    monkeypatch.setattr(resnet50, "resnet50", small_resnet50)


def with_random_statistics(network: nn.Module, seed: int = 1) -> nn.Module:
    """In evaluation mode, with batch norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return network.eval().requires_grad_(False)


def make_network(arch: str = "resnet50", seed: int = 0, **heads) -> resnet50.PrototypeNetwork:
    torch.manual_seed(seed)
    return with_random_statistics(hub.build_network(arch, **(HEADS | {"nmb_prototypes": 20} | heads)))


def prefixed(network: nn.Module) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in network.state_dict().items()}


def pretraining_file(network: nn.Module) -> dict:
    """A published pre-training file: a flat dictionary."""
    return prefixed(network)


def training_checkpoint(network: nn.Module) -> dict:
    """``checkpoint.pth.tar`` of the official main scripts; the learning rate is a numpy number there."""
    group = {"lr": np.float64(0.6), "momentum": 0.9, "params": [0]}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [group]}
    return {
        "epoch": 400,
        "state_dict": prefixed(network),
        "optimizer": optimizer,
        "amp": {"loss_scaler0": {"unskipped": 3}},
    }


def finetuned_checkpoint(trunk_arch: str = "resnet50", seed: int = 3) -> tuple[nn.Module, dict]:
    """A network fine-tuned by the official eval_semisup, and its checkpoint."""
    network = make_network(trunk_arch, seed, output_dim=NUM_CLASSES, hidden_mlp=0, nmb_prototypes=0, normalize=False)
    return network, {
        "epoch": 20,
        "state_dict": prefixed(network),
        "optimizer": {"state": {}, "param_groups": []},
        "scheduler": {"last_epoch": 20},
        "best_acc": (53.9, 78.5),
    }


def linear_checkpoint(dim: int = 256) -> dict:
    """A classifier of the official eval_linear."""
    torch.manual_seed(4)
    return {
        "epoch": 100,
        "state_dict": {
            "module.linear.weight": torch.randn(NUM_CLASSES, dim),
            "module.linear.bias": torch.randn(NUM_CLASSES),
        },
        "optimizer": {"state": {}, "param_groups": []},
        "scheduler": {"last_epoch": 100},
        "best_acc": 75.3,
    }
