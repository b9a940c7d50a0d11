"""Pictures of the end-of-run report: the views as they enter the networks, and curves of the log."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from shared import distributed
from shared.run.log import read_log

from .curves import Curve, Panel, save_panels
from .sheets import Tile, save_sheet, to_pixels


@dataclass(frozen=True)
class Plot:
    """One panel of the curves, over the steps of a run.

    Attributes:
        title, ylabel: Of the panel.
        series: Legend of each curve, by its key in the lines of the log; lines that lack one of them are left out.
        reference: Key and legend of a constant of these lines, drawn dashed.
        points: For the few values of evaluations: marked, the first and the last one written beside them.
        least_range: Keeps the y axis from magnifying noise.
    """

    title: str
    ylabel: str
    series: dict[str, str]
    reference: tuple[str, str] | None = None
    points: bool = False
    least_range: float = 0.0


def accuracy_plot(title: str, key: str = "knn_top1") -> Plot:
    """An accuracy in percent, measured between epochs."""
    return Plot(title, "top-1 accuracy (%)", {key: ""}, points=True, least_range=10)


def save_curves(log_path: str | Path, path: str | Path, heading: str, plots: Sequence[Plot]) -> Path:
    """Curves of a run; plots without lines are left out.

    Args:
        log_path: ``metrics.jsonl`` of a run.
        path: PNG file to write.
        plots: The first one is of every training step.

    Raises:
        ValueError: If the log holds no training steps.
    """
    lines, panels = read_log(log_path), []
    for plot in plots:
        drawn = [line for line in lines if all(line.get(key) is not None for key in plot.series)]  # None: not finite
        if not drawn and not panels:
            raise ValueError(f"{log_path} holds no training steps")
        if not drawn:
            continue
        x = [line["step"] for line in drawn]
        style = "points" if plot.points else "line"
        curves = [Curve(x, [line[key] for line in drawn], label, style) for key, label in plot.series.items()]
        if plot.reference is not None:
            key, label = plot.reference
            curves.append(Curve([x[0], x[-1]], [drawn[0][key]] * 2, label, "reference"))
        panels.append(Panel(plot.title, "step", plot.ylabel, curves, plot.least_range))
    return save_panels(panels, path, heading)


def view_tiles(views: Sequence[Tensor | np.ndarray], title: str, first: int = 1) -> list[Tile]:
    """Views (uint8, (C, H, W)) with titles, in which ``{n}`` counts from ``first`` and ``{px}`` is the height."""
    pixels = [to_pixels(view) for view in views]
    return [Tile(view, title.format(n=n, px=len(view))) for n, view in enumerate(pixels, start=first)]


def save_views(groups: Sequence[Sequence[Tile]], path: str | Path, heading: str, per_row: int = 8) -> Path:
    """The views of one image at relative sizes; every group starts a row.

    Args:
        groups: From :func:`view_tiles`.
        path: PNG file to write.
        per_row: Groups of more views go on in further rows.
    """
    rows = [list(group[i : i + per_row]) for group in groups for i in range(0, len(group), per_row)]
    largest = max(len(tile.pixels) for row in rows for tile in row)
    heights = [max(2.6 * len(row[0].pixels) / largest, 1.15) for row in rows]
    return save_sheet(rows, path, heading, heights)


def pictures_folder(output_dir: Path) -> Path:
    """``pictures/`` in the folder of a run, made by rank 0."""
    folder = output_dir / "pictures"
    if distributed.is_main_process():
        folder.mkdir(exist_ok=True)
    return folder
