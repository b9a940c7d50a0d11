"""A picture of nearest neighbours in feature space: what a backbone holds for alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.images.loading import BadImages, EvalDataset, EvalTransform
from shared.images.sources import ImageSource
from shared.pictures.sheets import AGREE, DIFFER, Tile, save_sheet, thumbnail

from .features import extract_features
from .knn import nearest_neighbours
from .knn_monitor import KNNMonitor

QUERIES = 10
NEIGHBOURS = 8
MOST_IMAGES = 2000  # of one set that is searched for its own neighbours


@dataclass
class Gallery:
    """Images of a source with their features: feature i, shape (D,), belongs to image ``rows[i]``."""

    source: ImageSource
    rows: Sequence[int]
    features: Tensor

    def class_name(self, i: int) -> str:
        """Empty where there are no classes."""
        return "" if self.source.classes is None else self.source.classes[self.source.label(self.rows[i])]


def sample_gallery(backbone: nn.Module, source: ImageSource, transform: EvalTransform, device: torch.device) -> Gallery:
    """At most ``MOST_IMAGES`` images, evenly spaced over the source; every rank must call this."""
    rows = np.linspace(0, len(source) - 1, min(MOST_IMAGES, len(source))).astype(int).tolist()
    few = EvalDataset(source, transform, BadImages(len(source), max_fraction=1), rows)
    features, _ = extract_features(backbone, few, device)
    return Gallery(source, rows, features)


def galleries(backbone: nn.Module, source: ImageSource, knn: KNNMonitor) -> tuple[Gallery, Gallery]:
    """Queries and what to search: the val and train images of ``knn``, or images of ``source`` where it is off.

    Every rank must call this.
    """
    if knn.disabled_reason is not None:
        gallery = sample_gallery(backbone, source, knn.transform, knn.device)
        return gallery, gallery
    train, _, val, _ = knn.latest_features or knn.features(backbone)
    return Gallery(knn.val.source, range(len(val)), val), Gallery(knn.train.source, range(len(train)), train)


def save_nearest(queries: Gallery, database: Gallery, path: str | Path) -> Path:
    """Ten queries, evenly spaced, at the left, and their nearest neighbours by cosine similarity, one row each.

    Frames tell whether a neighbour is of the query's class.

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
    labelled = queries.source.classes is not None
    rows = []
    for q, scores, found in zip(chosen.tolist(), similarities.tolist(), indices.tolist(), strict=True):
        name = queries.class_name(q)
        row = [Tile(thumbnail(queries.source, queries.rows[q]), "" if rows else "query", name)]
        for place, (score, i) in enumerate(zip(scores[itself:], found[itself:], strict=True), start=1):
            tile = Tile(thumbnail(database.source, database.rows[i]), "" if rows else f"neighbour {place}")
            tile.caption = f"{database.class_name(i)}  {score:.3f}".strip()
            if labelled:
                tile.frame = AGREE if database.class_name(i) == name else DIFFER
            row.append(tile)
        rows.append(row)
    heading = ["Nearest neighbours in feature space", "The decimal number is the cosine similarity."]
    if labelled:
        frames = [tile.frame for row in rows for tile in row[1:]]
        agreeing = f"{frames.count(AGREE)} of {len(frames)} neighbours are of the query's class"
        heading.insert(1, f"{agreeing}: green frame yes, red no.")
    return save_sheet(rows, path, "\n".join(heading))
