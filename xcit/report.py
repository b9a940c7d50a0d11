"""End-of-run report: training views and curves, and what to run next."""

from collections.abc import Sequence
from pathlib import Path

import torch
from timm.data import Mixup
from torch import Tensor

from shared.pictures.report import SUPERVISED_PLOTS, Report
from shared.pictures.sheets import Tile, magnify, normalised_pixels, save_sheet
from shared.run.randomness import seed_step
from shared.run.run import Run
from shared.supervised.data import LabelledImages, LabelledViews

from .cross_covariance_transformer import ARCHITECTURES
from .hub import MEAN, STD


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


def tiles(images: Tensor, titles: Sequence[str]) -> list[Tile]:
    pixels = [magnify(normalised_pixels(image, MEAN, STD), 96) for image in images]
    return [Tile(picture, title) for picture, title in zip(pixels, titles, strict=True)]


def _mixed_label(target: Tensor, classes: Sequence[str]) -> str:
    shares, indices = target.topk(min(2, len(classes)))
    return ", ".join(f"{share:.2f} {classes[i]}" for share, i in zip(shares.tolist(), indices.tolist(), strict=True))


def report(run: Run, views: LabelledViews, mixup: Mixup | None, images: LabelledImages, best_acc1: float) -> None:
    """Draw views and curves, and print the text; ``best_acc1`` is the best top-1, that of ``best_model.pth``."""
    args, ending = run.args, Report(run, "xcit/main.py")
    ending.draw("views.png", lambda path: save_views(views, mixup, path))
    ending.draw_curves("XCiT, supervised training", SUPERVISED_PLOTS)

    network = {"model": args.model, "pretrained": run.path}
    seen = {"input_size": args.input_size, "full_crop": args.full_crop}
    ending.then("xcit/main.py", **network, **seen, eval=True)
    if args.model in ARCHITECTURES:
        size, folder = [args.input_size] * 2, run.output_dir / "export"
        ending.then("xcit/export.py", **network, image_size=size, output_dir=folder)
    ending.finish([*ending.top1(images.train, images.val), f"best top-1 {best_acc1:.1f} %"])
