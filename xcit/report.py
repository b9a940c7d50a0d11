"""What a run leaves for a person to look at: pictures, and a summary that says what was learned and what to do next."""

from pathlib import Path

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor

from shared.images.sources import ImageSource
from shared.pictures.sheets import Tile, magnify, save_sheet
from shared.run.randomness import seed_step
from shared.run.summary import command, end_of_run
from shared.supervised.data import LabelledViews
from shared.supervised.report import save_curves

from .augmentations import MEAN, STD
from .cross_covariance_transformer import ARCHITECTURES


def to_picture(view: Tensor) -> np.ndarray:
    """RGB pixels (H, W, 3), uint8, of a normalised view (C, H, W)."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    if len(view) == 1:
        mean, std = mean.mean(dim=0, keepdim=True), std.mean(dim=0, keepdim=True)
    pixels = (255 * (view * std[:, None, None] + mean[:, None, None])).round().clamp(0, 255).byte()
    return np.ascontiguousarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())


def save_views(views: LabelledViews, mixup: Mixup | None, path: Path, count: int = 8) -> Path:
    """Training views as they enter the network, with their labels, before and after mixing."""
    items = [views[(0, index)] for index in range(min(count, len(views) // 2 * 2))]
    images, labels = torch.stack([view for view, _, _ in items]), torch.tensor([label for _, label, _ in items])
    classes = views.source.classes
    rows = [[Tile(magnify(to_picture(image), 96), classes[label]) for image, label, _ in items]]
    heading = "Images as they enter the network"
    if mixup is not None:
        heading += "\nBelow: after Mixup or CutMix, with the labels that it gives"
        seed_step(views.seed, 0)
        images, targets = mixup(images, labels)
        rows.append(
            [Tile(magnify(to_picture(i), 96), _mixed_label(t, classes)) for i, t in zip(images, targets, strict=True)]
        )
    return save_sheet(rows, path, heading)


def _mixed_label(target: Tensor, classes: list[str]) -> str:
    shares, indices = target.topk(min(2, len(classes)))
    parts = [f"{share:.2f} {classes[i]}" for share, i in zip(shares.tolist(), indices.tolist(), strict=True)]
    return ", ".join(parts)


def save_pictures(views: LabelledViews, mixup: Mixup | None, output_dir: Path) -> list[Path]:
    """``views.png`` and ``curves.png`` in ``<output_dir>/pictures``."""
    folder = output_dir / "pictures"
    folder.mkdir(exist_ok=True)
    return [
        save_views(views, mixup, folder / "views.png"),
        save_curves(output_dir / "metrics.jsonl", folder / "curves.png", "XCiT, supervised training"),
    ]


def summary(
    output_dir: Path,
    network_and_data: dict[str, str | int | None],
    full_crop: bool,
    val: ImageSource,
    tested: dict[str, float],
    best_acc1: float,
    pictures: list[Path],
) -> str:
    """What was learned, where the files are and what to run next, as text for the end of a run.

    Args:
        network_and_data: The flags that an evaluation like those of the run needs: ``model`` and others.
        full_crop: Whether ``--full_crop`` is one of them.
        tested: Of the last evaluation; empty when the run was finished before.
        best_acc1: The best top-1 of the run, that of ``best_model.pth``.
    """
    weights = output_dir / "checkpoint.pth"
    learned = [f"best top-1 {best_acc1:.1f} %"]
    if tested:
        chance = 100 / len(val.classes)
        learned = [f"top-1 on {val.describe()}: {tested['test_acc1']:.1f} % (chance {chance:.1f} %), {learned[0]}"]
    evaluation = command("main.py", **network_and_data, pretrained=weights)
    commands = [evaluation + (" --full_crop" if full_crop else "") + " --eval"]
    model = network_and_data["model"]
    if model in ARCHITECTURES:
        commands.append(command("export.py", model=model, pretrained=weights, output_dir=output_dir / "export"))
    commands.append("python main.py --data-path YOUR_IMAGES --output_dir YOUR_RUN")
    return end_of_run(output_dir, weights, None, pictures, commands, learned=learned)
