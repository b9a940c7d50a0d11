"""The smallest runs of MSN, their images, and what they write."""

from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from shared.run.checkpoint import load_latest
from shared.run.log import read_log
from tests.tiny_training import Training

TINY_VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
FLAGS = (
    "--model_name deit_tiny --patch_size 8 --rand_size 32 --focal_size 16 --focal_views 2 --patch_drop 0.5 "
    "--drop_path_rate 0.2 --num_proto 16 --hidden_dim 16 --output_dim 8 --batch_size 4 --warmup 0 --epochs 2 "
    "--num_workers 0 --log_freq 2 --eval_knn_freq 0 --pictures off --device cpu --checkpoint_freq 1 --saveckp_steps 1"
)
ONE_EPOCH = (
    f"{FLAGS} --patch_drop 0.25 --drop_path_rate 0 --batch_size 8 --epochs 1 --log_freq 1 --checkpoint_freq 0 "
    "--saveckp_steps 0"
).split()
CHECKPOINT = "msn-latest.pth.tar"


def shrink_networks() -> None:
    """Make deit_tiny a ViT of 30 thousand parameters."""
    from msn import vision_transformer

    vision_transformer.ARCHITECTURES["deit_tiny"] = TINY_VIT


def check_names(state: dict) -> None:
    assert state["world_size"] == 2 and all(name.startswith("module.") for name in state["encoder"])


SMALL_NETWORK = ("deit_tiny", {"patch_size": 8, "img_size": 16})
TRAININGS = {
    "msn": Training(
        "msn.main",
        tuple(FLAGS.split()),
        pair=("--batch_size", "2"),
        prepare=shrink_networks,
        whole=("--model_name", "deit_micro"),
        check_pair=check_names,
        exact=("--drop_path_rate", "0"),
        launcher=("msn.main_distributed", "main"),
        job=("--epochs", "20", "--checkpoint_freq", "0"),
    )
}


# --- Runs in the process of a test ------------------------------------------------------------------------------------


def small_networks():
    """:func:`shrink_networks` for a while."""
    from msn import vision_transformer

    return mock.patch.dict(vision_transformer.ARCHITECTURES, deit_tiny=TINY_VIT)


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
    """Lines of the log of a run of three steps, if these flags do not make it longer."""
    from msn.main import parse_args, train_msn

    train_msn(parse_args([*ONE_EPOCH, "--folder", str(output_dir), *map(str, flags)]))
    return read_log(Path(output_dir) / "metrics.jsonl")


def losses(output_dir: Path) -> list[float]:
    return [line["loss"] for line in read_log(Path(output_dir) / "metrics.jsonl") if "loss" in line]


def state_of(output_dir: Path) -> dict:
    return load_latest(Path(output_dir) / CHECKPOINT)
