"""End-of-run report: training views and curves, what was learned, and what to run next."""

import argparse
from pathlib import Path

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor

from shared.images.sources import ImageSource
from shared.pictures.report import Plot, accuracy_plot, pictures_folder, save_curves
from shared.pictures.sheets import Tile, magnify, save_sheet, to_pixels
from shared.run.log import read_log
from shared.run.randomness import seed_step
from shared.run.summary import accuracy, command, end_of_run
from shared.supervised.data import LabelledViews

from .cross_covariance_transformer import ARCHITECTURES
from .hub import MEAN, STD

PLOTS = (Plot("Training", "loss", {"loss": ""}), accuracy_plot("Accuracy on the val part", "test_acc1"))


def to_picture(view: Tensor) -> np.ndarray:
    """RGB pixels (H, W, 3), uint8, of a normalised view (C, H, W)."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    if len(view) == 1:
        mean, std = mean.mean(dim=0, keepdim=True), std.mean(dim=0, keepdim=True)
    return to_pixels((255 * (view * std + mean)).round().clamp(0, 255).byte())


def tiles(images: Tensor, titles: list[str]) -> list[Tile]:
    return [Tile(magnify(to_picture(image), 96), title) for image, title in zip(images, titles, strict=True)]


def save_views(views: LabelledViews, mixup: Mixup | None, path: Path, count: int = 8) -> Path:
    """Training views as they enter the network, with their labels, before and after mixing."""
    images, labels, _ = zip(*(views[(0, index)] for index in range(min(count, len(views) // 2 * 2))), strict=True)
    images, classes = torch.stack(images), views.source.classes
    rows = [tiles(images, [classes[label] for label in labels])]
    heading = "Images as they enter the network"
    if mixup is not None:
        heading += "\nBelow: after Mixup or CutMix, with the labels that it gives"
        seed_step(views.seed, 0)
        images, targets = mixup(images, torch.tensor(labels))
        rows.append(tiles(images, [_mixed_label(target, classes) for target in targets]))
    return save_sheet(rows, path, heading)


def _mixed_label(target: Tensor, classes: list[str]) -> str:
    shares, indices = target.topk(min(2, len(classes)))
    return ", ".join(f"{share:.2f} {classes[i]}" for share, i in zip(shares.tolist(), indices.tolist(), strict=True))


def save_pictures(views: LabelledViews, mixup: Mixup | None, output_dir: Path) -> list[Path]:
    """``views.png`` and ``curves.png`` in ``<output_dir>/pictures``."""
    folder = pictures_folder(output_dir)
    curves = save_curves(output_dir / "metrics.jsonl", folder / "curves.png", "XCiT, supervised training", PLOTS)
    return [save_views(views, mixup, folder / "views.png"), curves]


def summary(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    output_dir: Path,
    val: ImageSource,
    best_acc1: float,
    pictures: list[Path],
) -> str:
    """The text at the end of a run; ``best_acc1`` is the best top-1 of the run, that of ``best_model.pth``.

    Args:
        args: The flags of the run.
        parser: Knows which of them have their defaults.
    """
    weights = output_dir / "checkpoint.pth"
    lines = read_log(output_dir / "metrics.jsonl")
    learned = accuracy(lines, "test_acc1", f"top-1 on {val.describe()}", len(val.classes))
    learned.append(f"best top-1 {best_acc1:.1f} %")
    needed = ("data_path", "val_path", "data_set", "inat_category", "input_size", "in_chans")
    given = {flag: getattr(args, flag) for flag in needed if getattr(args, flag) != parser.get_default(flag)}
    full_crop = " --full_crop" if args.full_crop else ""
    commands = [command("main.py", model=args.model, pretrained=weights, **given) + full_crop + " --eval"]
    if args.model in ARCHITECTURES:
        commands.append(command("export.py", model=args.model, pretrained=weights, output_dir=output_dir / "export"))
    commands.append("python main.py --data-path YOUR_IMAGES --output_dir YOUR_RUN")
    return end_of_run(output_dir, weights, None, pictures, commands, learned=learned)
