"""The smallest runs of SwAV and DeepCluster-v2."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from shared import distributed
from swav import hub, resnet50
from tests.run_folders import lines
from tests.tiny_training import Training

# --- For the suites that kill, launch and compare runs ----------------------------------------------------------------

TINY = (
    "--arch test_resnet --nmb_crops 2 2 --size_crops 32 16 --min_scale_crops 0.3 0.1 --max_scale_crops 1 0.3 "
    "--base_lr 0.5 --warmup_epochs 0 --device cpu --workers 0 --eval_knn_freq 0 --pictures off"
)
FLAGS = (
    f"{TINY} --feat_dim 4 --hidden_mlp 8 --batch_size 4 --epochs 2 --freeze_prototypes_niters 3 --log_freq 2 "
    "--checkpoint_freq 1 --saveckp_steps 1"
)
PAIR, JOB = ("--batch_size", "2"), ("--epochs", "20", "--checkpoint_freq", "0")
LAUNCHER = ("swav.run_with_submitit", "main")


def check_queue(state: dict) -> None:
    assert state["queue"]["embeddings"].shape == (2, 2, 8, 4)


def check_memory(state: dict) -> None:
    assert state["memory"]["embeddings"].shape == (2, 2, 12, 4)


SMALL_NETWORK = ("test_resnet", {})
TRAININGS = {
    "swav": Training(
        "swav.main_swav",
        (*FLAGS.split(), *"--nmb_prototypes 6 --queue_length 16 --epoch_queue_starts 0".split()),
        pair=PAIR,
        check_pair=check_queue,
        rounding=0.01,
        launcher=LAUNCHER,
        job=JOB,
    ),
    "deepclusterv2": Training(
        "swav.main_deepclusterv2",
        (*FLAGS.split(), "--nmb_prototypes", "6", "5"),
        pair=PAIR,
        check_pair=check_memory,
        rounding=0.05,
        launcher=LAUNCHER,
        launch_flags=("--method", "deepclusterv2"),
        job=JOB,
    ),
}

# --- For tests in this process ----------------------------------------------------------------------------------------

SMALL = f"{TINY} --feat_dim 8 --hidden_mlp 16 --batch_size 8 --epochs 1 --log_freq 1 --checkpoint_freq 0".split()
SWAV = [*SMALL, "--nmb_prototypes", "6", "--freeze_prototypes_niters", "2"]
DEEPCLUSTERV2 = [*SMALL, "--nmb_prototypes", "6", "5"]


def train_swav(output_dir, *flags) -> list[dict]:
    """Lines of the log of a SwAV training."""
    from swav.main_swav import parse_args, train_swav

    train_swav(parse_args([*SWAV, "--dump_path", str(output_dir), *map(str, flags)]))
    return lines(output_dir)


def train_deepclusterv2(output_dir, *flags) -> list[dict]:
    """Lines of the log of a DeepCluster-v2 training."""
    from swav.main_deepclusterv2 import parse_args, train_deepclusterv2

    train_deepclusterv2(parse_args([*DEEPCLUSTERV2, "--dump_path", str(output_dir), *map(str, flags)]))
    return lines(output_dir)


def train_on_rank(rank: int, train: Callable, *flags) -> None:
    """One of several processes of ``run_processes``, which have joined already."""
    distributed.init = lambda *_: torch.device("cpu")
    train(*flags)


# --- Labelled images --------------------------------------------------------------------------------------------------

COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


def write_picture(path: Path, seed: int, colour: tuple[int, int, int]) -> Path:
    """Coarse random blocks around a colour, 40 x 48 pixels."""
    noise = np.random.default_rng(seed).normal(0, 25, size=(5, 6, 3))
    blocks = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1)).save(path)
    return path


def write_class_folders(root: Path, images_per_class: int, seed: int = 0) -> Path:
    """``root/<colour>/<number>.png``."""
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(images_per_class):
            write_picture(root / name / f"{i:03d}.png", 1000 * seed + 100 * c + i, colour)
    return root


def write_train_and_val(root: Path) -> Path:
    """Six images of each class to learn from, three to classify."""
    write_class_folders(root / "train", 6)
    write_class_folders(root / "val", 3, seed=1)
    return root


# --- Small networks, and files of every layout that the official code writes, made from them --------------------------

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


def pretraining_file(network: nn.Module) -> dict[str, Tensor]:
    """A published pre-training file: a flat dictionary."""
    return {f"module.{name}": value for name, value in network.state_dict().items()}


def training_checkpoint(network: nn.Module) -> dict:
    """``checkpoint.pth.tar`` of the official main scripts; the learning rate is a numpy number there."""
    group = {"lr": np.float64(0.6), "momentum": 0.9, "params": [0]}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [group]}
    return {
        "epoch": 400,
        "state_dict": pretraining_file(network),
        "optimizer": optimizer,
        "amp": {"loss_scaler0": {"unskipped": 3}},
    }


def finetuned_checkpoint(trunk_arch: str = "resnet50", seed: int = 3) -> tuple[nn.Module, dict]:
    """A network fine-tuned by the official eval_semisup, and its checkpoint."""
    network = make_network(trunk_arch, seed, output_dim=NUM_CLASSES, hidden_mlp=0, nmb_prototypes=0, normalize=False)
    return network, {
        "epoch": 20,
        "state_dict": pretraining_file(network),
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
