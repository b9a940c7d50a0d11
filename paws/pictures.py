"""Pictures of a run: the views as they enter the network, the curves, the most and the least certain images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from shared.images.loading import EvalTransform
from shared.pictures.curves import Curve, Panel, save_panels
from shared.pictures.sheets import AGREE, DIFFER, Tile, magnify, save_sheet, to_pixels
from shared.run.log import read_log

from .labels import PartlyLabelled

THUMBNAIL_PX = 96
PER_ROW, ROWS = 10, 3
VIEWS_PER_ROW = 8


def save_certainty(
    images: PartlyLabelled, rows: np.ndarray, found: np.ndarray, confidences: np.ndarray, path: Path
) -> Path:
    """The most certain images of every class in turn, then the least certain ones, with label and confidence.

    Args:
        rows: Their indices.
        found: The pseudo-label of each.
        confidences: Its probability.
    """
    order = np.argsort(-confidences, kind="stable")
    place_in_class = np.zeros(len(order), dtype=np.int64)
    for label in np.unique(found):
        mine = order[found[order] == label]
        place_in_class[mine] = np.arange(len(mine))
    in_turn = np.lexsort((-confidences, place_in_class))  # the surest of each class, then the second of each, ...
    few = min(PER_ROW * ROWS, len(order) // 2 or 1)
    blocks = (("most certain", in_turn[:few]), ("least certain", order[::-1][:few]))
    sheet = []
    for title, chosen in blocks:
        tiles = [_tile(images, rows[i], found[i], confidences[i]) for i in chosen]
        tiles[0].title = title
        sheet += [tiles[start : start + PER_ROW] for start in range(0, len(tiles), PER_ROW)]
    heading = (
        f"Pseudo-labels of {len(rows):,} images\nThe most certain of each label in turn, then the least certain of all."
    )
    heading += "\nBelow each: the label and its probability."
    if images.truth is not None:
        heading += "\nFrame: green where the label is right, red where it is wrong."
    return save_sheet(sheet, path, heading)


def _tile(images: PartlyLabelled, row: int, label: int, confidence: float) -> Tile:
    pixels = images.source.load(int(row)).decode()
    pixels = to_pixels(EvalTransform(THUMBNAIL_PX, THUMBNAIL_PX)(magnify(pixels, THUMBNAIL_PX)))
    frame = None
    if images.truth is not None:
        frame = AGREE if images.truth[row] == label else DIFFER
    name = images.classes[label]
    name = name if len(name) <= 12 else name[:11] + "…"
    return Tile(pixels, caption=f"{name}  {confidence:.2f}", frame=frame)


def save_views(groups: Sequence[Tensor], path: str | Path) -> Path:
    """The views of one image, one row for each resolution, at relative sizes.

    Args:
        groups: uint8 images (V_i, C, H_i, W_i) of each resolution.
        path: PNG file to write.
    """
    pixels = [to_pixels(view) for group in groups for view in group]
    largest = max(view.shape[0] for view in pixels)
    rows = [[Tile(view, f"large view {i + 1}") for i, view in enumerate(pixels[:2])]]
    small = [Tile(view, f"small view {i + 1}") for i, view in enumerate(pixels[2:])]
    rows += [small[start : start + VIEWS_PER_ROW] for start in range(0, len(small), VIEWS_PER_ROW)]
    heights = [max(2.6 * row[0].pixels.shape[0] / largest, 1.15) for row in rows]
    heading = "One image as it enters the network\nAll views have to get the same pseudo-label."
    return save_sheet(rows, path, heading, heights)


def save_curves(log_path: str | Path, path: str | Path) -> Path:
    """Loss, diversity and certainty of the pseudo-labels, and the accuracy over a run.

    Args:
        log_path: ``metrics.jsonl`` of a run.
        path: PNG file to write.

    Raises:
        ValueError: If the log holds no training steps.
    """
    lines = read_log(log_path)
    training = [line for line in lines if line.get("ploss") is not None]  # None: no step of the line was finite
    if not training:
        raise ValueError(f"{log_path} holds no training steps")
    x = [line["step"] for line in training]

    def curve(key: str, label: str) -> Curve:
        return Curve(x, [line[key] for line in training], label)

    ends = [x[0], x[-1]]
    loss = [curve("ploss", "cross-entropy of two views"), curve("mean_entropy", "entropy of the mean prediction")]
    loss.append(Curve(ends, [training[0]["ln_k"]] * 2, "ln K: all classes alike", "reference"))
    panels = [
        Panel("Pseudo-labels", "step", "nats", loss),
        Panel("Certainty", "step", "largest probability", [curve("certainty", "mean, sharpened")], least_range=0.2),
    ]
    evaluations = [line for line in lines if "snn_top1" in line]
    if evaluations:
        points = Curve(
            [line["step"] for line in evaluations], [line["snn_top1"] for line in evaluations], style="points"
        )
        panels.append(Panel("Soft nearest neighbours", "step", "top-1 accuracy (%)", [points], least_range=10))
    return save_panels(panels, path, "PAWS training")
