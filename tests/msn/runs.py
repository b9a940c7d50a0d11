"""Small trainings through the real script, on images small enough for a laptop."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from msn import vision_transformer
from msn.main import parse_args, train_msn
from shared.run.checkpoint import load_latest

TINY_VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY = (
    "--model_name deit_tiny --patch_size 8 --rand_size 32 --focal_size 16 --focal_views 2 --patch_drop 0.25 "
    "--num_proto 16 --hidden_dim 16 --output_dim 8 --batch_size 8 --warmup 0 --epochs 1 --num_workers 0 --log_freq 1 "
    "--eval_knn_freq 0 --pictures off --device cpu --checkpoint_freq 0"
).split()
CHECKPOINT = "msn-latest.pth.tar"


@contextlib.contextmanager
def small_networks() -> Iterator[None]:
    """Make deit_tiny a ViT of 30 thousand parameters."""
    real = vision_transformer.ARCHITECTURES["deit_tiny"]
    vision_transformer.ARCHITECTURES["deit_tiny"] = TINY_VIT
    try:
        yield
    finally:
        vision_transformer.ARCHITECTURES["deit_tiny"] = real


def write_images(folder: Path, per_class: int = 8) -> Path:
    """Three class folders of coarse blocks around a colour of the class."""
    rng = np.random.default_rng(0)
    for i in range(3 * per_class):
        path = folder / f"class{i % 3}" / f"class{i % 3}_{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = np.array([40, 40, 40]) + 150 * np.eye(3)[i % 3]
        blocks = np.clip(rng.normal(colour, 40, size=(5, 6, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1)).save(path)
    return folder


def train(output_dir: Path, *flags) -> list[dict]:
    """Lines of the log of a run with the flags of TINY and these."""
    train_msn(parse_args([*TINY, "--folder", str(output_dir), *map(str, flags)]))
    return lines(output_dir)


def lines(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir: Path) -> list[float]:
    return [line["loss"] for line in lines(output_dir) if "loss" in line]


def state_of(output_dir: Path) -> dict:
    return load_latest(Path(output_dir) / CHECKPOINT)


def assert_same_state(a: dict, b: dict) -> None:
    """Bit by bit."""
    for key in ("encoder", "target_encoder"):
        assert a[key].keys() == b[key].keys()
        for name in a[key]:
            assert torch.equal(a[key][name], b[key][name]), f"{key} {name}"
    assert torch.equal(a["prototypes"], b["prototypes"])
    for index, moments in a["opt"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, b["opt"]["state"][index][name]), f"moment {name} of parameter {index}"
    for key in ("epoch", "step_in_epoch", "loss", "batch_size", "world_size", "lr", "temperature"):
        assert a[key] == b[key], key
