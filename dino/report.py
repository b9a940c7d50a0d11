"""What a run leaves for a person to look at: pictures, and a summary that says what was learned and what to do next."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import distributed
from shared.data import EvalDataset, EvalTransform, ImageSource
from shared.evaluation.features import extract_features
from shared.evaluation.knn import nearest_neighbours
from shared.evaluation.knn_monitor import KNNMonitor
from shared.multicrop import MultiCropDataset
from shared.pictures import read_log

from .augmentations import MEAN, STD
from .pictures import save_curves, save_neighbours, save_views
from .vision_transformer import VisionTransformer
from .visualize_attention import save_attention

QUERIES = 10
NEIGHBOURS = 8
MOST_IMAGES = 2000  # searched for neighbours when there is no validation split


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
        queries, database = knn.val.source, knn.train.source
        database_features, _, query_features, _ = knn.latest_features or knn.features(backbone)
        same_images = False
    else:
        queries = database = views.source
        few = torch.utils.data.Subset(
            EvalDataset(database, EvalTransform(round(image_size * 256 / 224), image_size, MEAN, STD, views.in_chans)),
            range(min(MOST_IMAGES, len(database))),
        )
        database_features, _ = extract_features(backbone, few, device)
        query_features, same_images = database_features, True
    if not distributed.is_main_process():
        return []
    folder.mkdir(exist_ok=True)

    image_views, _, _ = views[(0, 0)]
    paths = [
        save_views([view for group in image_views for view in group], folder / "views.png"),
        _save_neighbours(queries, query_features, database, database_features, folder / "neighbours.png", same_images),
        save_curves(output_dir / "metrics.jsonl", folder / "curves.png"),
    ]
    if isinstance(backbone, VisionTransformer):
        transform = EvalTransform(image_size, image_size, MEAN, STD, views.in_chans)
        image = transform(queries.load(0).decode()).to(device)
        training = backbone.training
        paths.append(save_attention(backbone.eval(), image, folder / "attention")[0])
        backbone.train(training)
    return paths


def _save_neighbours(
    queries: ImageSource,
    query_features: Tensor,
    database: ImageSource,
    database_features: Tensor,
    path: Path,
    same_images: bool,
) -> Path:
    rows = torch.linspace(0, len(query_features) - 1, min(QUERIES, len(query_features))).long()
    skip = int(same_images)  # an image is its own nearest neighbour
    k = min(NEIGHBOURS + skip, len(database_features))
    similarities, indices = nearest_neighbours(
        F.normalize(query_features[rows], dim=1), F.normalize(database_features, dim=1), k
    )
    similarities, indices = similarities[:, skip:].tolist(), indices[:, skip:].tolist()
    size = 96  # pixels of a thumbnail
    thumbnail = EvalTransform(size, size)

    def picture(source: ImageSource, index: int) -> Tensor:
        return thumbnail(source.load(index).decode())

    def name(source: ImageSource, index: int) -> str:
        return source.classes[source.label(index)]

    labelled = queries.classes is not None
    return save_neighbours(
        [picture(queries, i) for i in rows.tolist()],
        [[picture(database, j) for j in row] for row in indices],
        path,
        [name(queries, i) for i in rows.tolist()] if labelled else None,
        [[name(database, j) for j in row] for row in indices] if labelled else None,
        similarities,
    )


def summary(
    output_dir: Path, arch: str, patch_size: int, data_path: str | None, knn: KNNMonitor, pictures: list[Path]
) -> str:
    """What was learned, where the files are and what to run next, as text for the end of a run."""
    lines = read_log(output_dir / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    accuracies = [line["knn_top1"] for line in lines if "knn_top1" in line]
    first, last = training[0], training[-1]
    text = [f"loss {first['loss']:.3f} at step {first['step']}, {last['loss']:.3f} at step {last['step']}"]
    if len(accuracies) > 1:
        text.append(
            f"k-NN on {knn.val.source.describe()}: {accuracies[0]:.1f} % before training, {accuracies[-1]:.1f} % after "
            f"(chance {100 / len(knn.val.source.classes):.1f} %)"
        )
    elif knn.off:
        text.append(f"no k-NN evaluation: {knn.off}")
    weights = output_dir / "checkpoint.pth"
    network = f"--arch {arch}" + (f" --patch_size {patch_size}" if arch.startswith(("vit", "deit")) else "")
    data = f" --data_path {data_path}" if data_path else ""
    rows = [("Learned", text), ("Checkpoint", [f"{weights} (the same command resumes from it)"])]
    if pictures:
        rows.append(("Pictures", [str(path) for path in pictures]))
    rows.append(
        (
            "Next",
            [
                f"python eval_knn.py {network} --pretrained_weights {weights}{data}",
                f"python eval_linear.py {network} --pretrained_weights {weights}{data}",
                f"python visualize_attention.py {network} --pretrained_weights {weights} --image_path YOUR_IMAGE",
                "python main_dino.py --arch vit_small --data_path YOUR_IMAGES --output_dir YOUR_RUN",
            ],
        )
    )
    return "\n".join(f"{title if i == 0 else '':12s}{line}" for title, block in rows for i, line in enumerate(block))
