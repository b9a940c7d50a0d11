"""Tiny trainings through the real scripts, on generated images."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shared import distributed
from shared.run.checkpoint import load_latest
from swav import main_deepclusterv2, main_swav

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--arch test_resnet --nmb_crops 2 2 --size_crops 32 16 --min_scale_crops 0.3 0.1 --max_scale_crops 1 0.3 "
    "--feat_dim 8 --hidden_mlp 16 --batch_size 8 --base_lr 0.5 --warmup_epochs 0 --epochs 1 --workers 0 --log_freq 1 "
    "--eval_knn_freq 0 --pictures off --device cpu --checkpoint_freq 0"
).split()
SWAV = [*TINY, "--nmb_prototypes", "6", "--freeze_prototypes_niters", "2"]
DEEPCLUSTERV2 = [*TINY, "--nmb_prototypes", "6", "5"]


def write_noise(folder: Path, count: int = 24) -> Path:
    """Small noise images in three class folders: three steps of 8."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return folder


def train_swav(output_dir, *flags) -> list[dict]:
    """Lines of the log of a SwAV training."""
    arguments = [*SWAV, "--dump_path", str(output_dir), *map(str, flags)]
    main_swav.train_swav(main_swav.parse_args(arguments))
    return lines(output_dir)


def train_deepclusterv2(output_dir, *flags) -> list[dict]:
    """Lines of the log of a DeepCluster-v2 training."""
    arguments = [*DEEPCLUSTERV2, "--dump_path", str(output_dir), *map(str, flags)]
    main_deepclusterv2.train_deepclusterv2(main_deepclusterv2.parse_args(arguments))
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
