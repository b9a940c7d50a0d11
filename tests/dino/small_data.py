"""Small data sets and checkpoints in the layouts that the evaluation scripts read."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dino.vision_transformer import vit_tiny

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


def write_grey_checkpoint(path: Path) -> Path:
    """A training checkpoint of a ViT-tiny/8 for images of one channel."""
    torch.manual_seed(0)
    backbone = vit_tiny(patch_size=8, img_size=[16], in_chans=1)
    torch.save({"teacher": {f"backbone.{name}": value for name, value in backbone.state_dict().items()}}, path)
    return path


def write_class_folders(root: Path, images_per_class: int, colours=COLOURS, seed: int = 0) -> Path:
    """``root/<colour>/<number>.png``."""
    for c, (name, colour) in enumerate(colours.items()):
        for i in range(images_per_class):
            write_image(root / name / f"{i:03d}.png", picture(1000 * seed + 100 * c + i, colour))
    return root


def write_train_and_val(root: Path, train_per_class: int = 6, val_per_class: int = 3) -> Path:
    write_class_folders(root / "train", train_per_class)
    write_class_folders(root / "val", val_per_class, seed=1)
    return root
