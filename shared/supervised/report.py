"""Curves of a supervised training."""

from pathlib import Path

from shared.pictures.curves import Curve, Panel, save_panels
from shared.run.log import read_log


def save_curves(log_path: Path, path: Path, title: str) -> Path:
    """The training loss and the accuracy over a run, as a picture."""
    lines = read_log(log_path)
    training = [line for line in lines if line.get("loss") is not None]  # None: no step of the line was finite
    steps = [line["step"] for line in training]
    panels = [Panel("Training", "step", "loss", [Curve(steps, [line["loss"] for line in training])])]
    tests = [line for line in lines if "test_acc1" in line]
    if tests:
        curve = Curve([line["step"] for line in tests], [line["test_acc1"] for line in tests], style="points")
        panels.append(Panel("Accuracy on the val part", "step", "top-1 (%)", [curve], least_range=10))
    return save_panels(panels, path, title)
