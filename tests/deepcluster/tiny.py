"""The smallest runs of DeepCluster, and small data and weights for its evaluations."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from deepcluster.checkpoints import official_names
from deepcluster.convnets import new_top_layer
from deepcluster.hub import build_network
from tests.tiny_training import Training

FLAGS = (
    "--arch test_resnet --crop_size 32 --k 5 --pca_dim 4 --batch 4 --epochs 2 --device cpu --workers 0 --log_freq 2 "
    "--eval_knn_freq 0 --pictures off --saveckp_steps 1 --checkpoints 5"
)


def check_clusters(state: dict) -> None:
    assert state["clustered_epoch"] == 1


SMALL_NETWORK = ("test_resnet", {"img_size": 32})
TRAININGS = {
    "deepcluster": Training(
        "deepcluster.main",
        tuple(FLAGS.split()),
        data=("{images}",),  # its batch is that of all processes together
        check_pair=check_clusters,
        rounding=0.1,
        launcher=("deepcluster.run_with_submitit", "main"),
        job=("--epochs", "20", "--checkpoints", "0"),
    )
}
# of its own tests: three steps an epoch, a line for each
TINY = (*FLAGS.split(), *"--batch 8 --log_freq 1 --saveckp_steps 0 --checkpoints 4".split())


def write_images(folder: Path, count: int = 24) -> Path:
    """Small images in three class folders: coarse blocks around a colour of the class."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        colour = np.array([40, 40, 40]) + 150 * np.eye(3)[i % 3]
        blocks = np.clip(rng.normal(colour, 40, size=(5, 6, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1)).save(path)
    return folder


def write_checkpoint(path: Path, arch: str = "alexnet", sobel: bool = True, clusters: int = 7, img_size: int = 64):
    """A file as the official code writes it, of a network for images of ``img_size`` pixels."""
    torch.manual_seed(0)
    network = build_network(arch, sobel, img_size=img_size)
    weights = official_names(network.state_dict())
    weights |= {f"top_layer.{k}": v for k, v in new_top_layer(network.dim, clusters).state_dict().items()}
    state = {"epoch": 3, "arch": arch, "state_dict": weights, "optimizer": {}, "args": {"crop_size": img_size}}
    torch.save(state, path)
    return path
