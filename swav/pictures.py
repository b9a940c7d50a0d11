"""Pictures of a run: the views as they enter the network; loss, prototypes in use and k-NN accuracy."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from shared.pictures.curves import Curve, Panel, save_panels
from shared.pictures.sheets import Tile, save_sheet, to_pixels
from shared.run.log import read_log

VIEWS_PER_ROW = 8


def save_views(groups: Sequence[Tensor], path: str | Path) -> Path:
    """The views of one image, one row for each resolution, at relative sizes.

    Args:
        groups: uint8 images (V_i, C, H_i, W_i) of each resolution.
        path: PNG file to write.
    """
    pixels = [[to_pixels(view) for view in group] for group in groups]
    largest = max(view.shape[0] for group in pixels for view in group)
    rows, number = [], 0
    for group in pixels:
        tiles = [Tile(view, f"crop {number + i}, {view.shape[0]} px") for i, view in enumerate(group)]
        rows += [tiles[start : start + VIEWS_PER_ROW] for start in range(0, len(tiles), VIEWS_PER_ROW)]
        number += len(group)
    heights = [max(2.6 * row[0].pixels.shape[0] / largest, 1.15) for row in rows]
    heading = "One image as it enters the network\nEvery crop predicts the codes of the others."
    return save_sheet(rows, path, heading, heights)


def save_curves(log_path: str | Path, path: str | Path, heading: str = "SwAV training") -> Path:
    """The loss, the prototypes in use and the k-NN accuracy over a run.

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
    loss = [Curve(x, [line["loss"] for line in training], "loss")]
    if "code_entropy" in training[0]:
        loss.append(Curve(x, [line["code_entropy"] for line in training], "entropy of the codes"))
    loss.append(Curve([x[0], x[-1]], [training[0]["ln_k"]] * 2, "ln K: knows nothing", "reference"))
    used = [
        Curve(x, [line["prototypes_used"] for line in training], "used in the epoch so far"),
        Curve(x, [line["prototype_perplexity"] for line in training], "perplexity"),
    ]
    panels = [Panel("Prediction of the codes", "step", "nats", loss), Panel("Prototypes", "step", "number", used)]
    evaluations = [line for line in lines if "knn_top1" in line]
    if evaluations:
        curve = Curve(
            [line["step"] for line in evaluations], [line["knn_top1"] for line in evaluations], style="points"
        )
        panels.append(Panel("Weighted k-NN of the features", "step", "top-1 accuracy (%)", [curve], least_range=10))
    return save_panels(panels, path, heading)
