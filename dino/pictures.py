"""Pictures of a run: the views as they enter the networks, nearest neighbours, loss and k-NN curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.data import BadImages, EvalDataset, EvalTransform, ImageError, ImageSource
from shared.evaluation.features import extract_features
from shared.evaluation.knn import nearest_neighbours
from shared.pictures import AGREE, DIFFER, Curve, Panel, Tile, read_log, save_panels, save_sheet, to_pixels

LOCAL_VIEWS_PER_ROW = 8
TEACHER_VIEWS = 2
QUERIES = 10
NEIGHBOURS = 8
MOST_IMAGES = 2000  # of one set that is searched for its own neighbours
THUMBNAIL_PX = 96


def save_views(views: Sequence[Tensor | np.ndarray], path: str | Path, titles: Sequence[str] | None = None) -> Path:
    """The views of one image, at relative sizes.

    Args:
        views: uint8 images (3, H, W), the two global views first.
        path: PNG file to write.
        titles: One for each view; by default its kind, number and size.
    """
    pixels = [to_pixels(view) for view in views]
    if titles is None:
        kinds = ["global"] * TEACHER_VIEWS + ["local"] * (len(pixels) - TEACHER_VIEWS)
        numbers = [*range(1, TEACHER_VIEWS + 1), *range(1, len(pixels) - TEACHER_VIEWS + 1)]
        titles = [f"{k} {n}, {p.shape[0]} px" for k, n, p in zip(kinds, numbers, pixels, strict=False)]
    tiles = [Tile(p, title) for p, title in zip(pixels, titles, strict=True)]
    rows = [tiles[:TEACHER_VIEWS]]
    for start in range(TEACHER_VIEWS, len(tiles), LOCAL_VIEWS_PER_ROW):
        rows.append(tiles[start : start + LOCAL_VIEWS_PER_ROW])
    largest = max(p.shape[0] for p in pixels)
    heights = [max(2.6 * row[0].pixels.shape[0] / largest, 1.15) for row in rows]
    heading = "One image as it enters the networks\nThe student sees all views, the teacher the global ones only."
    return save_sheet(rows, path, heading, heights)


def save_neighbours(
    query_images: Sequence[Tensor | np.ndarray],
    neighbour_images: Sequence[Sequence[Tensor | np.ndarray]],
    path: str | Path,
    query_labels: Sequence | None = None,
    neighbour_labels: Sequence[Sequence] | None = None,
    similarities: Sequence[Sequence[float]] | None = None,
) -> Path:
    """Queries at the left and their nearest neighbours, nearest first, one row each.

    Args:
        query_images: Q uint8 images (3, H, W).
        neighbour_images: Q x k uint8 images.
        path: PNG file to write.
        query_labels: Q class names or numbers.
        neighbour_labels: Q x k of them; frames tell whether they agree with the query's.
        similarities: Q x k cosine similarities.
    """
    rows, agreeing, total = [], 0, 0
    for q, (query, neighbours) in enumerate(zip(query_images, neighbour_images, strict=True)):
        row = [Tile(to_pixels(query), "query" if q == 0 else "", _caption(query_labels, q))]
        for i, neighbour in enumerate(neighbours):
            frame = None
            caption = _caption(neighbour_labels[q] if neighbour_labels is not None else None, i)
            if query_labels is not None and neighbour_labels is not None:
                agrees = _plain(neighbour_labels[q][i]) == _plain(query_labels[q])
                frame = AGREE if agrees else DIFFER
                agreeing, total = agreeing + agrees, total + 1
            if similarities is not None:
                caption = f"{caption}  {float(similarities[q][i]):.2f}".strip()
            row.append(Tile(to_pixels(neighbour), f"neighbour {i + 1}" if q == 0 else "", caption, frame))
        rows.append(row)
    notes = []
    if total:
        notes.append(f"{agreeing} of {total} neighbours are of the query's class: green frame yes, red no.")
    if similarities is not None:
        notes.append("The decimal number is the cosine similarity.")
    return save_sheet(rows, path, "\n".join(["Nearest neighbours in feature space", *notes]))


@dataclass
class Gallery:
    """Images of a source with their features: feature i, shape (D,), belongs to image ``rows[i]``."""

    source: ImageSource
    rows: Sequence[int]
    features: Tensor


def sample_gallery(backbone: nn.Module, source: ImageSource, transform: EvalTransform, device: torch.device) -> Gallery:
    """At most ``MOST_IMAGES`` images, evenly spaced over the source; every rank must call this."""
    rows = np.linspace(0, len(source) - 1, min(MOST_IMAGES, len(source))).astype(int).tolist()
    few = EvalDataset(source, transform, BadImages(len(source), max_fraction=1), rows)
    features, _ = extract_features(backbone, few, device)
    return Gallery(source, rows, features)


def save_nearest(queries: Gallery, database: Gallery, path: str | Path) -> Path:
    """Ten queries, evenly spaced, and their nearest neighbours by cosine similarity.

    Args:
        queries: The same object as ``database`` to search a set for its own neighbours; an image is then not counted
            among its neighbours.
        path: PNG file to write.
    """
    chosen = torch.linspace(0, len(queries.rows) - 1, min(QUERIES, len(queries.rows))).long()
    itself = int(queries is database)  # the nearest neighbour of an image is itself
    similarities, indices = nearest_neighbours(
        F.normalize(queries.features[chosen], dim=1),
        F.normalize(database.features, dim=1),
        min(NEIGHBOURS + itself, len(database.rows)),
    )
    similarities = similarities[:, itself:].tolist()
    query_rows = [queries.rows[i] for i in chosen.tolist()]
    neighbour_rows = [[database.rows[j] for j in row] for row in indices[:, itself:].tolist()]
    labelled = queries.source.classes is not None
    return save_neighbours(
        [_thumbnail(queries.source, i) for i in query_rows],
        [[_thumbnail(database.source, j) for j in row] for row in neighbour_rows],
        path,
        [_class_name(queries.source, i) for i in query_rows] if labelled else None,
        [[_class_name(database.source, j) for j in row] for row in neighbour_rows] if labelled else None,
        similarities,
    )


def _thumbnail(source: ImageSource, row: int) -> Tensor:
    """uint8, (3, THUMBNAIL_PX, THUMBNAIL_PX); grey where the image cannot be read."""
    try:
        return EvalTransform(THUMBNAIL_PX, THUMBNAIL_PX)(source.load(row).decode())
    except ImageError:
        return torch.full((3, THUMBNAIL_PX, THUMBNAIL_PX), 128, dtype=torch.uint8)


def _class_name(source: ImageSource, row: int) -> str:
    return source.classes[source.label(row)]


def _plain(label):
    return label.item() if hasattr(label, "item") else label


def _caption(labels: Sequence | None, index: int) -> str:
    return "" if labels is None else str(_plain(labels[index]))


def save_curves(log_path: str | Path, path: str | Path) -> Path:
    """The loss, the teacher's entropy and the k-NN accuracy over a run.

    Args:
        log_path: ``metrics.jsonl`` of a run.
        path: PNG file to write.

    Raises:
        ValueError: If the log holds no training steps.
    """
    lines = read_log(log_path)
    training = [line for line in lines if line.get("loss") is not None]  # None: no step of the line was finite
    if not training:
        raise ValueError(f"{log_path} holds no training steps")
    steps = [line["step"] for line in training]
    panels = [Panel("Loss of the student", "step", "cross-entropy", [Curve(steps, [x["loss"] for x in training])])]

    health = [line for line in training if line.get("teacher_entropy") is not None]
    if health:
        x = [line["step"] for line in health]
        curves = [
            Curve(x, [line["teacher_entropy"] for line in health], "entropy of the teacher's output"),
            Curve(x, [line["kl"] for line in health], "KL from teacher to student"),
            Curve([x[0], x[-1]], [health[0]["ln_k"]] * 2, "ln K: a uniform output", "reference"),
        ]
        panels.append(Panel("Collapse shows as a KL of 0", "step", "nats", curves))
    evaluations = [line for line in lines if "knn_top1" in line]
    if evaluations:
        curve = Curve([x["step"] for x in evaluations], [x["knn_top1"] for x in evaluations], style="points")
        panels.append(
            Panel("Weighted k-NN of the teacher's features", "step", "top-1 accuracy (%)", [curve], least_range=10)
        )
    return save_panels(panels, path, "DINO training")
