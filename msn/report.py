"""What a run leaves for a person to look at: pictures, and a summary that says what was learned and what to do next."""

import argparse
from pathlib import Path

import torch

from shared import distributed
from shared.evaluation.knn_monitor import KNNMonitor
from shared.evaluation.neighbours import save_nearest_neighbours
from shared.images.loading import BadImages, EvalDataset, EvalTransform
from shared.multicrop import MultiCropDataset
from shared.run.summary import command, end_of_run

from .hub import MEAN, STD
from .pictures import save_curves, save_views
from .vision_transformer import Trunk, draw_kept_patches
from .visualize_attention import save_attention


def save_pictures(
    trunk: Trunk,
    views: MultiCropDataset,
    knn: KNNMonitor,
    image_size: int,
    patch_drop: float,
    output_dir: Path,
    device: torch.device,
) -> list[Path]:
    """Views of one image, neighbours of ten queries, curves and attention; every rank must call this.

    Args:
        trunk: Of the target encoder.
        views: The training set.
        knn: If it has evaluated, queries are validation images, else training images.
        image_size: Side in pixels at which the encoder is evaluated.
        patch_drop: Share of the patches of the masked anchors that are not seen.
        output_dir: Folder of the run; pictures go to ``pictures/`` inside it.
    """
    folder = output_dir / "pictures"
    if distributed.is_main_process():
        folder.mkdir(exist_ok=True)
    neighbours = save_nearest_neighbours(trunk, views, knn, image_size, MEAN, STD, folder / "neighbours.png", device)
    if not distributed.is_main_process():
        return []

    encoder = trunk.encoder
    groups, _, _ = views[(0, 0)]
    images = [view for group in groups for view in group]
    patch_size, rand_views = encoder.patch_embed.patch_size, len(groups[0]) - 1
    masked = images[1]
    num_patches = (masked.shape[-1] // patch_size) ** 2
    kept = draw_kept_patches(num_patches, patch_drop) if patch_drop else None
    paths = [
        save_views(images, rand_views, kept, patch_size, folder / "views.png"),
        neighbours,
        save_curves(output_dir / "metrics.jsonl", folder / "curves.png"),
    ]
    transform = EvalTransform(image_size, image_size, MEAN, STD, views.in_chans)
    source = knn.val.source if knn.disabled_reason is None else views.source
    image, *_ = EvalDataset(source, transform, BadImages(len(source), max_fraction=1))[0]
    training = encoder.training
    paths.append(save_attention(encoder.eval(), image.to(device), folder / "attention")[0])
    encoder.train(training)
    return paths


def summary(
    output_dir: Path,
    weights: Path,
    args: argparse.Namespace,
    knn: KNNMonitor,
    pictures: list[Path],
    problems: list[str],
) -> str:
    """What was learned, where the files are and what to run next, as text for the end of a run.

    Args:
        weights: The last checkpoint.
        args: The run's flags.
        problems: Sentences of the collapse monitor.
    """
    return end_of_run(output_dir, weights, knn, pictures, next_commands(weights, args, knn), problems=problems)


def next_commands(weights: Path, args: argparse.Namespace, knn: KNNMonitor) -> list[str]:
    """Evaluations of the network that was trained, as they can be pasted into a shell."""
    network = {"model_name": args.model_name, "pretrained": weights.parent, "fname": weights.name}
    size = args.rand_size if args.rand_size != 224 else None
    data = {"data_path": args.data_path, "val_path": args.val_path, "image_size": size}
    commands = []
    if not knn.disabled_reason:
        few = len(knn.train.source) < 200  # by default the script asks for 200 neighbours
        commands.append(command("logistic_eval.py", **network, **data, imgs_per_class=5))
        commands.append(command("eval_knn.py", **network, **data, nb_knn=knn.k if few else None))
    image = {"image_path": "YOUR_IMAGE", "image_size": 2 * args.rand_size if size else None}
    commands.append(command("visualize_attention.py", **network, **image))
    return [*commands, "python main.py --data_path YOUR_IMAGES --folder YOUR_RUN"]
