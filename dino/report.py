"""What a run leaves for a person to look at: pictures, and a summary that says what was learned and what to do next."""

import shlex
from pathlib import Path

import torch
from torch import nn

from shared import distributed
from shared.data import BadImages, EvalDataset, EvalTransform
from shared.evaluation.knn_monitor import KNNMonitor
from shared.multicrop import MultiCropDataset
from shared.pictures import read_log

from .augmentations import MEAN, STD
from .networks import VIT_NAMES
from .pictures import Gallery, sample_gallery, save_curves, save_nearest, save_views
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
    if knn.off is None:
        train_features, _, val_features, _ = knn.latest_features or knn.features(backbone)
        database = Gallery(knn.train.source, range(len(train_features)), train_features)
        queries = Gallery(knn.val.source, range(len(val_features)), val_features)
    else:
        transform = EvalTransform(round(image_size * 256 / 224), image_size, MEAN, STD, views.in_chans)
        queries = database = sample_gallery(backbone, views.source, transform, device)
    if not distributed.is_main_process():
        return []
    folder.mkdir(exist_ok=True)

    image_views, _, _ = views[(0, 0)]
    paths = [
        save_views([view for group in image_views for view in group], folder / "views.png"),
        save_nearest(queries, database, folder / "neighbours.png"),
        save_curves(output_dir / "metrics.jsonl", folder / "curves.png"),
    ]
    if isinstance(backbone, VisionTransformer):
        transform = EvalTransform(image_size, image_size, MEAN, STD, views.in_chans)
        readable = BadImages(len(queries.source), max_fraction=1)
        image, *_ = EvalDataset(queries.source, transform, readable)[0]
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
    lines = read_log(output_dir / "metrics.jsonl")
    losses = [line for line in lines if line.get("loss") is not None]
    accuracies = [line for line in lines if "knn_top1" in line]
    learned = [f"loss {line['loss']:.3f} at step {line['step']}" for line in (losses[:1] + losses[1:][-1:])]
    learned = [", ".join(learned)]
    if accuracies:
        before = f"{accuracies[0]['knn_top1']:.1f} % after {accuracies[0]['step']} steps, " if accuracies[1:] else ""
        learned.append(
            f"k-NN on {knn.val.source.describe()}: {before}{accuracies[-1]['knn_top1']:.1f} % after "
            f"{accuracies[-1]['step']} steps (chance {100 / len(knn.val.source.classes):.1f} %)"
        )
    elif knn.off:
        learned.append(f"no k-NN evaluation: {knn.off}")
    files = [
        f"{output_dir / 'checkpoint.pth'} (the same command resumes from it)",
        f"{output_dir / 'metrics.jsonl'} (every few steps), {output_dir / 'log.txt'} (every epoch)",
    ]
    blocks = {
        "Learned": learned,
        "Problems": problems,
        "Files": files,
        "Pictures": [str(path) for path in pictures],
        "Next": next_commands(output_dir, arch, patch_size, image_size, data_path, val_path, knn),
    }
    return "\n".join(
        f"{title if i == 0 else '':10s}{line}" for title, block in blocks.items() for i, line in enumerate(block)
    )


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
    if data_path and not knn.off:  # the scripts have defaults for the embedded data
        evaluation["image_size"] = image_size if image_size != 224 else None
        linear = {"num_labels": len(knn.val.source.classes), "output_dir": output_dir / "linear"}
    attention = {"image_path": "YOUR_IMAGE", "data_path": data_path, "output_dir": output_dir / "attention"}
    attention["image_size"] = 2 * image_size if image_size != 224 else None
    commands = []
    if not knn.off:
        few = len(knn.train.source) < 200  # by default the script asks for 200 neighbours
        commands.append(command("eval_knn.py", **evaluation, nb_knn=knn.k if few else None))
        commands.append(command("eval_linear.py", **evaluation, **linear))
    if arch in VIT_NAMES:
        commands.append(command("visualize_attention.py", **flags, **attention))
    return [*commands, "python main_dino.py --arch vit_small --data_path YOUR_IMAGES --output_dir YOUR_RUN"]


def command(script: str, **flags) -> str:
    """A command line; flags without a value are left out."""
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value is not None]
    return " ".join(["python", script, *given])
