"""The smallest runs of SwAV and DeepCluster-v2."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shared import distributed
from shared.run.checkpoint import load_latest
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


def lines(output_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir) -> list[float]:
    return [line["loss"] for line in lines(output_dir) if "loss" in line]


def state_of(output_dir) -> dict:
    return load_latest(Path(output_dir) / "checkpoint.pth.tar")


def comparable(state: dict) -> dict:
    """A checkpoint without what a clock or another command line changes."""
    state["log"].pop("lengths")
    return {key: value for key, value in state.items() if key != "args"}


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
