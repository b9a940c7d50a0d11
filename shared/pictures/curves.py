"""Curves of a log, one panel beside the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .sheets import DPI, FAINT, INK, text

if TYPE_CHECKING:  # Matplotlib is imported where it draws
    from matplotlib.axes import Axes


@dataclass
class Curve:
    """Points to draw: ``x`` and ``y`` of equal length, and how.

    Attributes:
        label: For the legend; empty for none.
        style: ``line``, ``points`` (joined, with first and last value written beside them) or ``reference`` (dashed).
    """

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    style: str = "line"


@dataclass
class Panel:
    """One pair of axes; ``least_range`` keeps its y axis from magnifying noise, ``from_zero`` makes it start there."""

    title: str
    xlabel: str
    ylabel: str
    curves: Sequence[Curve]
    least_range: float = 0.0
    from_zero: bool = False


COLORS = ("#1f5fa8", "#c8702a", "#2a8f4a", "#8a4fa3")


def save_panels(panels: Sequence[Panel], path: str | Path, heading: str, rows: int = 1) -> Path:
    """Write curves, one panel beside the other, in ``rows`` rows of equally many."""
    from matplotlib.figure import Figure

    columns = len(panels) // rows
    figure = Figure(figsize=(4.6 * columns, 4.4 * rows), dpi=DPI, facecolor="white", layout="constrained")
    title = text(heading)
    figure.suptitle(title.pop("s"), fontsize=13, weight="bold", color=INK, **title)
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True):
        _draw_panel(axes, panel)
    figure.savefig(path)
    return Path(path)


def _draw_panel(axes: "Axes", panel: Panel) -> None:
    colors = iter(COLORS)
    for curve in panel.curves:
        label = curve.label or None
        if curve.style == "reference":
            axes.plot(curve.x, curve.y, "--", color=FAINT, linewidth=1.2, label=label)
        elif curve.style == "points":
            axes.plot(curve.x, curve.y, "o-", color=next(colors), markersize=6, linewidth=1.6, label=label)
            for i in {0, len(curve.x) - 1}:
                axes.annotate(
                    f"{curve.y[i]:.1f}",
                    (curve.x[i], curve.y[i]),
                    xytext=(0, 8),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                )
            axes.margins(x=0.12, y=0.18)
        else:
            marker = "." if len(curve.x) <= 20 else None  # a single point is no line
            axes.plot(curve.x, curve.y, color=next(colors), linewidth=1.6, marker=marker, label=label)
    low, high = axes.get_ylim()
    if high - low < panel.least_range:
        middle = (low + high) / 2
        axes.set_ylim(middle - panel.least_range / 2, middle + panel.least_range / 2)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize=11, color=INK)
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if any(curve.label for curve in panel.curves):
        axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16))  # never on a curve
