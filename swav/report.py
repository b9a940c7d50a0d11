"""What a run leaves for a person to look at: pictures, and a summary that says what was learned and what to do next."""

from pathlib import Path

import torch
from torch import nn

from shared import distributed
from shared.evaluation.knn_monitor import KNNMonitor
from shared.evaluation.neighbours import save_nearest_neighbours
from shared.multicrop import MultiCropDataset
from shared.run.log import read_log
from shared.run.summary import command, end_of_run

from .hub import MEAN, STD
from .pictures import save_curves, save_views


def save_pictures(
    trunk: nn.Module,
    views: MultiCropDataset,
    knn: KNNMonitor,
    image_size: int,
    output_dir: Path,
    device: torch.device,
    heading: str = "SwAV training",
) -> list[Path]:
    """Views of one image, neighbours of ten queries and curves; every rank must call this.

    Args:
        trunk: Maps images to features.
        views: The training set.
        knn: If it has evaluated, queries are validation images, else training images.
        image_size: Side in pixels at which the trunk is evaluated.
        output_dir: Folder of the run; pictures go to ``pictures/`` inside it.
        heading: Of the curves.
    """
    folder = output_dir / "pictures"
    if distributed.is_main_process():
        folder.mkdir(exist_ok=True)
    neighbours = save_nearest_neighbours(trunk, views, knn, image_size, MEAN, STD, folder / "neighbours.png", device)
    if not distributed.is_main_process():
        return []
    groups, _, _ = views[(0, 0)]
    return [
        save_views(groups, folder / "views.png"),
        neighbours,
        save_curves(output_dir / "metrics.jsonl", folder / "curves.png", heading),
    ]


def summary(
    script: str,
    output_dir: Path,
    weights: Path,
    arch: str,
    data_path: str | None,
    knn: KNNMonitor,
    pictures: list[Path],
    problems: list[str],
) -> str:
    """What was learned, where the files are and what to run next, as text for the end of a run.

    Args:
        problems: Sentences of the collapse monitor.
    """
    last = [line for line in read_log(output_dir / "metrics.jsonl") if "loss" in line][-1]
    used = (
        f"{last['prototypes_used']:.0f} prototypes used by the {last['assigned']:.0f} assignments of the last epoch "
        f"(perplexity {last['prototype_perplexity']:.1f})"
    )
    flags = {"arch": arch, "pretrained": weights, "data_path": data_path}
    commands = [
        command("clusters.py", **flags),
        command("eval_linear.py", **flags),
        f"python {script} --data_path YOUR_IMAGES --dump_path YOUR_RUN",
    ]
    return end_of_run(output_dir, weights, knn, pictures, commands, learned=(used,), problems=problems)
