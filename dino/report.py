"""What a run leaves for a person to look at: pictures, and a summary that says what was learned and what to do next."""

from pathlib import Path

import torch
from torch import nn

from shared import distributed
from shared.data import EvalTransform
from shared.evaluation.knn_monitor import KNNMonitor
from shared.evaluation.neighbours import save_nearest_neighbours
from shared.evaluation.summary import end_of_run
from shared.multicrop import MultiCropDataset

from .augmentations import MEAN, STD
from .pictures import save_curves, save_views
from .vision_transformer import VisionTransformer
from .visualize_attention import save_attention


def save_pictures(
    backbone: nn.Module,
    views: MultiCropDataset,
    knn: KNNMonitor,
    image_size: int,
    output_dir: Path,
    device: torch.device,
) -> list[Path]:
    """Views of one image, neighbours of ten queries, curves, and a ViT's attention; every rank must call this.

    Args:
        backbone: The teacher's.
        views: The training set.
        knn: If it has evaluated, queries are validation images, else training images.
        image_size: Side in pixels at which the backbone is evaluated.
        output_dir: Folder of the run; pictures go to ``pictures/`` inside it.
    """
    folder = output_dir / "pictures"
    if distributed.is_main_process():
        folder.mkdir(exist_ok=True)
    neighbours = save_nearest_neighbours(backbone, views, knn, image_size, MEAN, STD, folder / "neighbours.png", device)
    if not distributed.is_main_process():
        return []

    image_views, _, _ = views[(0, 0)]
    paths = [
        save_views([view for group in image_views for view in group], folder / "views.png"),
        neighbours,
        save_curves(output_dir / "metrics.jsonl", folder / "curves.png"),
    ]
    if isinstance(backbone, VisionTransformer):
        transform = EvalTransform(image_size, image_size, MEAN, STD, views.in_chans)
        queries = knn.val.source if knn.off is None else views.source
        image = transform(queries.load(0).decode()).to(device)
        training = backbone.training
        paths.append(save_attention(backbone.eval(), image, folder / "attention")[0])
        backbone.train(training)
    return paths


def summary(
    output_dir: Path, arch: str, patch_size: int, data_path: str | None, knn: KNNMonitor, pictures: list[Path]
) -> str:
    """What was learned, where the files are and what to run next, as text for the end of a run."""
    weights = output_dir / "checkpoint.pth"
    network = f"--arch {arch}" + (f" --patch_size {patch_size}" if arch.startswith(("vit", "deit")) else "")
    data = f" --data_path {data_path}" if data_path else ""
    commands = [
        f"python eval_knn.py {network} --pretrained_weights {weights}{data}",
        f"python eval_linear.py {network} --pretrained_weights {weights}{data}",
        f"python visualize_attention.py {network} --pretrained_weights {weights} --image_path YOUR_IMAGE",
        "python main_dino.py --arch vit_small --data_path YOUR_IMAGES --output_dir YOUR_RUN",
    ]
    return end_of_run(output_dir, weights, knn, pictures, commands)
