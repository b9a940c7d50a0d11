"""Pictures of a run: the views as they enter the networks, loss and k-NN curves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from shared.pictures.curves import Curve, Panel, save_panels
from shared.pictures.sheets import Tile, save_sheet, to_pixels
from shared.run.log import read_log

LOCAL_VIEWS_PER_ROW = 8
TEACHER_VIEWS = 2


def save_views(views: Sequence[Tensor | np.ndarray], path: str | Path, titles: Sequence[str] | None = None) -> Path:
    """The views of one image, at relative sizes.

    Args:
        views: uint8 images (3, H, W), the two global views first.
        path: PNG file to write.
        titles: One for each view; by default its kind, number and size.
    """
    pixels = [to_pixels(view) for view in views]
    if titles is None:
        kinds = ["global"] * TEACHER_VIEWS + ["local"] * (len(pixels) - TEACHER_VIEWS)
        numbers = [*range(1, TEACHER_VIEWS + 1), *range(1, len(pixels) - TEACHER_VIEWS + 1)]
        titles = [f"{k} {n}, {p.shape[0]} px" for k, n, p in zip(kinds, numbers, pixels, strict=False)]
    tiles = [Tile(p, title) for p, title in zip(pixels, titles, strict=True)]
    rows = [tiles[:TEACHER_VIEWS]]
    for start in range(TEACHER_VIEWS, len(tiles), LOCAL_VIEWS_PER_ROW):
        rows.append(tiles[start : start + LOCAL_VIEWS_PER_ROW])
    largest = max(p.shape[0] for p in pixels)
    heights = [max(2.6 * row[0].pixels.shape[0] / largest, 1.15) for row in rows]
    heading = "One image as it enters the networks\nThe student sees all views, the teacher the global ones only."
    return save_sheet(rows, path, heading, heights)


def save_curves(log_path: str | Path, path: str | Path) -> Path:
    """The loss, the teacher's entropy and the k-NN accuracy over a run.

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
    steps = [line["step"] for line in training]
    panels = [Panel("Loss of the student", "step", "cross-entropy", [Curve(steps, [x["loss"] for x in training])])]

    health = [line for line in training if line.get("teacher_entropy") is not None]
    if health:
        x = [line["step"] for line in health]
        curves = [
            Curve(x, [line["teacher_entropy"] for line in health], "entropy of the teacher's output"),
            Curve(x, [line["kl"] for line in health], "KL from teacher to student"),
            Curve([x[0], x[-1]], [health[0]["ln_k"]] * 2, "ln K: a uniform output", "reference"),
        ]
        panels.append(Panel("Collapse shows as a KL of 0", "step", "nats", curves))
    evaluations = [line for line in lines if "knn_top1" in line]
    if evaluations:
        curve = Curve([x["step"] for x in evaluations], [x["knn_top1"] for x in evaluations], style="points")
        panels.append(
            Panel("Weighted k-NN of the teacher's features", "step", "top-1 accuracy (%)", [curve], least_range=10)
        )
    return save_panels(panels, path, "DINO training")
