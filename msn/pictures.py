"""Pictures of a run: the views as they enter the encoders, masks included, and curves of loss and k-NN."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from shared.pictures.curves import Curve, Panel, save_panels
from shared.pictures.sheets import Tile, save_sheet, to_pixels
from shared.run.log import read_log

VIEWS_PER_ROW = 10
GREY = 128  # of a patch that is not seen


def mask_patches(pixels: np.ndarray, kept: Sequence[int], patch_size: int) -> np.ndarray:
    """The image with all patches grey but those with the numbers ``kept``, row by row; pixels (H, W, 3), uint8."""
    columns = pixels.shape[1] // patch_size
    masked = np.full_like(pixels, GREY)
    for number in kept:
        row, column = divmod(int(number), columns)
        place = np.s_[row * patch_size : (row + 1) * patch_size, column * patch_size : (column + 1) * patch_size]
        masked[place] = pixels[place]
    return masked


def save_views(
    views: Sequence[Tensor | np.ndarray], rand_views: int, kept: Tensor | None, patch_size: int, path: str | Path
) -> Path:
    """The views of one image, at relative sizes.

    Args:
        views: uint8 images (3, H, W): the target, the random anchors, the focal anchors.
        rand_views: Number of random anchors.
        kept: Patches of the masked anchors that are seen, or None for all.
        patch_size: Side of a patch in pixels.
        path: PNG file to write.
    """
    pixels = [to_pixels(view) for view in views]
    masked = range(1, 1 + rand_views) if rand_views else range(1, len(pixels))
    tiles = [Tile(pixels[0], f"target, {len(pixels[0])} px")]
    for i, image in enumerate(pixels[1:], start=1):
        kind = "random" if i <= rand_views else "focal"
        seen = mask_patches(image, kept.tolist(), patch_size) if kept is not None and i in masked else image
        tiles.append(Tile(seen, f"{kind} anchor, {len(image)} px"))
    rows = [tiles[: 1 + rand_views]]
    for start in range(1 + rand_views, len(tiles), VIEWS_PER_ROW):
        rows.append(tiles[start : start + VIEWS_PER_ROW])
    heights = [max(2.6 * len(row[0].pixels) / len(pixels[0]), 1.15) for row in rows]
    heading = "One image as it enters the encoders\nThe target encoder sees the target, the encoder all anchors."
    return save_sheet(rows, path, heading, heights)


def save_curves(log_path: str | Path, path: str | Path) -> Path:
    """The loss, what its targets say, and the k-NN accuracy over a run.

    Args:
        log_path: ``metrics.jsonl`` of a run.
        path: PNG file to write.

    Raises:
        ValueError: If the log holds no training steps.
    """
    lines = read_log(log_path)
    training = [line for line in lines if line.get("loss") is not None]  # None: no step of the line was finite
    if not training:
        raise ValueError(f"{log_path} holds no training steps")
    x = [line["step"] for line in training]
    losses = [
        Curve(x, [line["msn"] for line in training], "cross-entropy of anchors and targets"),
        Curve(x, [line["me_max"] for line in training], "KL of the mean assignment from the prior"),
    ]
    panels = [Panel("Loss", "step", "nats", losses)]
    health = [line for line in training if line.get("target_entropy") is not None]
    if health:
        x = [line["step"] for line in health]
        curves = [
            Curve(x, [line["target_entropy"] for line in health], "entropy of a target"),
            Curve(x, [line["information"] for line in health], "what targets tell about their image"),
            Curve([x[0], x[-1]], [health[0]["ln_k"]] * 2, "ln K: a uniform target", "reference"),
        ]
        panels.append(Panel("Collapse shows as targets that tell nothing", "step", "nats", curves))
    evaluations = [line for line in lines if "knn_top1" in line]
    if evaluations:
        curve = Curve([x["step"] for x in evaluations], [x["knn_top1"] for x in evaluations], style="points")
        panels.append(
            Panel("Weighted k-NN of the target encoder", "step", "top-1 accuracy (%)", [curve], least_range=10)
        )
    return save_panels(panels, path, "MSN training")
