"""What a run leaves for a person to look at: pictures, and a summary that says what was learned and what to do next."""

from pathlib import Path

from torch import nn

from shared.images.sources import ImageSource
from shared.run.summary import command, end_of_run
from shared.supervised.report import save_curves

from .resmlp_models import ARCHITECTURES, ResMLP
from .visualize_cross_patch import save_cross_patch_layers


def save_pictures(network: nn.Module, output_dir: Path) -> list[Path]:
    """Curves, and the cross-patch layers of a ResMLP, in ``<output_dir>/pictures``."""
    folder = output_dir / "pictures"
    folder.mkdir(exist_ok=True)
    paths = [save_curves(output_dir / "metrics.jsonl", folder / "curves.png", "ResMLP, supervised training")]
    return paths + (save_cross_patch_layers(network, folder) if isinstance(network, ResMLP) else [])


def summary(
    output_dir: Path,
    model: str,
    data_path: str | None,
    val_path: str | None,
    val: ImageSource,
    tested: dict[str, float],
    best_acc1: float,
    pictures: list[Path],
) -> str:
    """What was learned, where the files are and what to run next, as text for the end of a run.

    Args:
        tested: Of the last evaluation; empty when the run was finished before.
        best_acc1: The best top-1 of the run, that of ``best_checkpoint.pth``.
    """
    weights = output_dir / "checkpoint.pth"
    learned = [f"best top-1 {best_acc1:.1f} %"]
    if tested:
        chance = 100 / len(val.classes)
        learned = [f"top-1 on {val.describe()}: {tested['test_acc1']:.1f} % (chance {chance:.1f} %), {learned[0]}"]
    commands = ["python main.py --data_path YOUR_IMAGES --output_dir YOUR_RUN"]
    if model in ARCHITECTURES:
        export = command("-m resmlp.export", pretrained_weights=weights, output_dir=output_dir / "export")
        knn = command("eval_knn.py", pretrained_weights=weights, data_path=data_path, val_path=val_path)
        commands = [knn, export, *commands]
    return end_of_run(output_dir, weights, None, pictures, commands, learned=learned)
