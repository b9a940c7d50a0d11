"""What a run leaves for a person to look at: pictures, and a summary that says what was learned and what to do next."""

from pathlib import Path

from torch import nn

from shared.data import ImageSource
from shared.evaluation.summary import command, end_of_run
from shared.pictures import Curve, Panel, read_log, save_panels

from .resmlp_models import ARCHITECTURES, ResMLP
from .visualize_cross_patch import save_cross_patch_layers


def save_curves(log_path: Path, path: Path) -> Path:
    """The training loss and the accuracy over a run."""
    lines = read_log(log_path)
    training = [line for line in lines if line.get("loss") is not None]  # None: no step of the line was finite
    steps = [line["step"] for line in training]
    panels = [Panel("Training", "step", "loss", [Curve(steps, [line["loss"] for line in training])])]
    tests = [line for line in lines if "test_acc1" in line]
    if tests:
        curve = Curve([line["step"] for line in tests], [line["test_acc1"] for line in tests], style="points")
        panels.append(Panel("Accuracy on the val part", "step", "top-1 (%)", [curve], least_range=10))
    return save_panels(panels, path, "ResMLP, supervised training")


def save_pictures(network: nn.Module, output_dir: Path) -> list[Path]:
    """Curves, and the cross-patch layers of a ResMLP, in ``<output_dir>/pictures``."""
    folder = output_dir / "pictures"
    folder.mkdir(exist_ok=True)
    paths = [save_curves(output_dir / "metrics.jsonl", folder / "curves.png")]
    return paths + (save_cross_patch_layers(network, folder) if isinstance(network, ResMLP) else [])


def summary(
    output_dir: Path,
    model: str,
    data_path: str | None,
    val_path: str | None,
    val: ImageSource,
    result: dict[str, float] | None,
    best_acc1: float,
    pictures: list[Path],
) -> str:
    """What was learned, where the files are and what to run next, as text for the end of a run.

    Args:
        result: Of the last evaluation; None when the run was finished before.
        best_acc1: The best top-1 of the run, that of ``best_checkpoint.pth``.
    """
    weights = output_dir / "checkpoint.pth"
    learned = [f"best top-1 {best_acc1:.1f} %"]
    if result is not None:
        chance = 100 / len(val.classes)
        learned = [f"top-1 on {val.describe()}: {result['acc1']:.1f} % (chance {chance:.1f} %), {learned[0]}"]
    commands = ["python main.py --data_path YOUR_IMAGES --output_dir YOUR_RUN"]
    if model in ARCHITECTURES:
        export = command("-m resmlp.export", pretrained_weights=weights, output_dir=output_dir / "export")
        knn = command("eval_knn.py", pretrained_weights=weights, data_path=data_path, val_path=val_path)
        commands = [knn, export, *commands]
    return end_of_run(output_dir, weights, None, pictures, commands, learned=learned)
