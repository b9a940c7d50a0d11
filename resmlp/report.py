"""End-of-run report: curves and cross-patch layers, what was learned, and what to run next."""

from pathlib import Path

from torch import nn

from shared.images.sources import ImageSource
from shared.pictures.report import Plot, accuracy_plot, pictures_folder, save_curves
from shared.run.log import read_log
from shared.run.summary import accuracy, command, end_of_run

from .resmlp_models import ARCHITECTURES, ResMLP
from .visualize_cross_patch import save_cross_patch_layers

PLOTS = (Plot("Training", "loss", {"loss": ""}), accuracy_plot("Accuracy on the val part", "test_acc1"))


def save_pictures(network: nn.Module, output_dir: Path) -> list[Path]:
    """Curves, and the cross-patch layers of a ResMLP, in ``<output_dir>/pictures``."""
    folder = pictures_folder(output_dir)
    curves = save_curves(output_dir / "metrics.jsonl", folder / "curves.png", "ResMLP, supervised training", PLOTS)
    return [curves] + (save_cross_patch_layers(network, folder) if isinstance(network, ResMLP) else [])


def summary(
    output_dir: Path,
    model: str,
    data_path: str | None,
    val_path: str | None,
    val: ImageSource,
    best_acc1: float,
    pictures: list[Path],
) -> str:
    """The text at the end of a run; ``best_acc1`` is the best top-1 of the run, that of ``best_checkpoint.pth``."""
    weights = output_dir / "checkpoint.pth"
    lines = read_log(output_dir / "metrics.jsonl")
    learned = accuracy(lines, "test_acc1", f"top-1 on {val.describe()}", len(val.classes))
    commands = ["python main.py --data_path YOUR_IMAGES --output_dir YOUR_RUN"]
    if model in ARCHITECTURES:
        export = command("-m resmlp.export", pretrained_weights=weights, output_dir=output_dir / "export")
        knn = command("eval_knn.py", pretrained_weights=weights, data_path=data_path, val_path=val_path)
        commands = [knn, export, *commands]
    learned.append(f"best top-1 {best_acc1:.1f} %")
    return end_of_run(output_dir, weights, None, pictures, commands, learned=learned)
