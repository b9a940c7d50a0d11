"""The smallest runs of DINO, and small data and weights for its evaluations."""

import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dino.vision_transformer import vit_tiny
from tests.tiny_training import Training

FLAGS = (
    "--patch_size 8 --global_crop_size 16 --local_crop_size 8 --local_crops_number 2 --out_dim 32 --device cpu "
    "--batch_size_per_gpu 4 --warmup_epochs 0 --epochs 2 --drop_path_rate 0.2 --eval_knn_freq 0 --pictures off "
    "--num_workers 0 --log_freq 2 --saveckp_freq 1 --saveckp_steps 1"
)


def shrink_networks() -> None:
    """Give main_dino.py networks of 40 thousand parameters."""
    from dino import main_dino
    from dino.vision_transformer import DINOHead, VisionTransformer

    def build_backbone(arch: str, patch_size: int, drop_path_rate: float, img_size: int, in_chans: int):
        network = VisionTransformer(
            img_size, patch_size, in_chans, embed_dim=32, depth=2, num_heads=2, drop_path_rate=drop_path_rate
        )
        return network, network.embed_dim

    main_dino.build_backbone = build_backbone
    main_dino.DINOHead = functools.partial(DINOHead, hidden_dim=32, bottleneck_dim=16)


SMALL_NETWORK = ("vit_tiny", {"patch_size": 8, "img_size": 16, "in_chans": 1})
TRAININGS = {
    "dino": Training(
        "dino.main_dino",
        tuple(FLAGS.split()),
        pair=("--batch_size_per_gpu", "2"),
        prepare=shrink_networks,
        whole=("--arch", "vit_tiny"),
        exact=("--drop_path_rate", "0"),
        launcher=("dino.run_with_submitit", "main"),
        job=("--epochs", "20", "--saveckp_freq", "0"),
    )
}

# --- For the evaluations ----------------------------------------------------------------------------------------------

OTHER_ARCHITECTURES = ["resnet18", "xcit_nano_12_p16", "test_vit"]  # torchvision, timm
COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


def picture(seed: int, colour: tuple[int, int, int] = (120, 120, 120), height: int = 40, width: int = 48) -> np.ndarray:
    """Coarse random blocks around a colour, uint8, (height, width, 3)."""
    noise = np.random.default_rng(seed).normal(0, 25, size=(height // 8, width // 8, 3))
    blocks = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)


def write_image(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_checkpoint(path: Path, patch_size: int = 8, in_chans: int = 3) -> Path:
    """A training checkpoint of a ViT-tiny for images of 16 pixels."""
    torch.manual_seed(0)
    backbone = vit_tiny(patch_size=patch_size, img_size=[16], in_chans=in_chans)
    torch.save({"teacher": {f"backbone.{name}": value for name, value in backbone.state_dict().items()}}, path)
    return path


def write_class_folders(root: Path, images_per_class: int, colours=COLOURS, seed: int = 0) -> Path:
    """``root/<colour>/<number>.png``."""
    for c, (name, colour) in enumerate(colours.items()):
        for i in range(images_per_class):
            write_image(root / name / f"{i:03d}.png", picture(1000 * seed + 100 * c + i, colour))
    return root


def write_train_and_val(root: Path) -> Path:
    write_class_folders(root / "train", 6)
    write_class_folders(root / "val", 3, seed=1)
    return root
