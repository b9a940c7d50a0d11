"""What a run leaves for a person to look at: pictures, and a summary that says what was learned and what to do next."""

from pathlib import Path

import torch
from timm.models.xcit import Xcit
from torch import nn

from shared import distributed
from shared.evaluation.knn_monitor import KNNMonitor
from shared.evaluation.neighbours import save_nearest_neighbours
from shared.images.loading import BadImages, EvalDataset, EvalTransform
from shared.multicrop import MultiCropDataset
from shared.run.summary import command, end_of_run

from .augmentations import MEAN, STD
from .hub import VIT_NAMES
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
    """Views of one image, neighbours of ten queries, curves, a ViT's or XCiT's attention; every rank must call this.

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
    # XCiT's patches are part of its name, and may be larger than small images
    if isinstance(backbone, VisionTransformer | Xcit) and backbone.patch_embed.patch_size <= image_size:
        transform = EvalTransform(image_size, image_size, MEAN, STD, views.in_chans)
        source = knn.val.source if knn.disabled_reason is None else views.source
        image, *_ = EvalDataset(source, transform, BadImages(len(source), max_fraction=1))[0]
        training = backbone.training
        paths.append(save_attention(backbone.eval(), image.to(device), folder / "attention")[0])
        backbone.train(training)
    return paths


def summary(
    output_dir: Path,
    arch: str,
    patch_size: int,
    image_size: int,
    data_path: str | None,
    val_path: str | None,
    knn: KNNMonitor,
    pictures: list[Path],
    problems: list[str],
) -> str:
    """What was learned, where the files are and what to run next, as text for the end of a run.

    Args:
        problems: Sentences of the collapse monitor.
    """
    weights = output_dir / "checkpoint.pth"
    commands = next_commands(output_dir, arch, patch_size, image_size, data_path, val_path, knn)
    return end_of_run(output_dir, weights, knn, pictures, commands, problems=problems)


def next_commands(
    output_dir: Path,
    arch: str,
    patch_size: int,
    image_size: int,
    data_path: str | None,
    val_path: str | None,
    knn: KNNMonitor,
) -> list[str]:
    """Evaluations of the network that was trained, as they can be pasted into a shell."""
    flags = {"arch": arch, "patch_size": patch_size if arch in VIT_NAMES else None}
    flags["pretrained_weights"] = output_dir / "checkpoint.pth"
    evaluation, linear = flags | {"data_path": data_path, "val_path": val_path}, {}
    if data_path and not knn.disabled_reason:  # the scripts have defaults for the embedded data
        evaluation["image_size"] = image_size if image_size != 224 else None
        linear = {"num_labels": len(knn.val.source.classes), "output_dir": output_dir / "linear"}
    attention = {"image_path": "YOUR_IMAGE", "data_path": data_path, "output_dir": output_dir / "attention"}
    attention["image_size"] = 2 * image_size if image_size != 224 else None
    commands = []
    if not knn.disabled_reason:
        few = len(knn.train.source) < 200  # by default the script asks for 200 neighbours
        commands.append(command("eval_knn.py", **evaluation, nb_knn=knn.k if few else None))
        commands.append(command("eval_linear.py", **evaluation, **linear))
    if arch in VIT_NAMES or arch.startswith("xcit_"):
        commands.append(command("visualize_attention.py", **flags, **attention))
    return [*commands, "python main_dino.py --arch vit_small --data_path YOUR_IMAGES --output_dir YOUR_RUN"]
