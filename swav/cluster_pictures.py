"""Pictures of a clustering: an overview, a contact sheet per cluster, how the images spread over the prototypes."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import ImageColor
from tqdm import tqdm

from shared.images.sources import ImageSource
from shared.pictures.curves import Curve, Panel, save_panels
from shared.pictures.sheets import DIFFER, DPI, Tile, save_sheet, thumbnail

from .clustering import Clustering

GAP_PX = 4
COLUMNS = 10  # of a contact sheet
STRIP = 8  # images of a cluster in the overview
OVERVIEW_CLUSTERS = 30
DOUBTFUL_ROWS = 1  # of a sheet that does not hold the whole cluster


def mosaic(images: Sequence[np.ndarray], columns: int, framed: Iterable[int] = ()) -> np.ndarray:
    """Images of equal size (S, S, 3) in rows, on white; those whose numbers are in ``framed`` get a red frame."""
    side = images[0].shape[0]
    step = side + GAP_PX
    rows = -(-len(images) // columns)
    canvas = np.full((rows * step - GAP_PX, columns * step - GAP_PX, 3), 255, dtype=np.uint8)
    framed, width = set(framed), max(2, side // 32)
    for number, image in enumerate(images):
        top, left = (number // columns) * step, (number % columns) * step
        place = canvas[top : top + side, left : left + side]
        if number in framed:
            place[:] = ImageColor.getrgb(DIFFER)
            place[width:-width, width:-width] = image[width:-width, width:-width]
        else:
            place[:] = image
    return canvas


def tile_of(source: ImageSource, clustering: Clustering, members: Sequence[int], columns: int, title: str) -> Tile:
    """A mosaic of images; where there are classes, those that are not the cluster's majority are framed."""
    images = [thumbnail(source, clustering.indices[member]) for member in members]
    framed = []
    if clustering.labels is not None:
        majority, _ = clustering.majority(clustering.clusters[members[0]])
        framed = [number for number, member in enumerate(members) if clustering.labels[member] != majority]
    return Tile(mosaic(images, columns, framed), title)


def beside(tiles: Sequence[Tile]) -> list[Tile]:
    """Tiles with some white between them."""
    space = Tile(np.full((tiles[0].pixels.shape[0], 6 * GAP_PX, 3), 255, dtype=np.uint8))
    return [tiles[0], *(tile for other in tiles[1:] for tile in (space, other))]


def describe_cluster(source: ImageSource, clustering: Clustering, cluster: int) -> str:
    """Its size and mean confidence, and the majority class where there are classes."""
    mine = clustering.clusters == cluster
    number = int(mine.sum())
    text = f"{number:,} image{'s' if number > 1 else ''}, confidence {clustering.confidences[mine].mean():.2f}"
    if clustering.labels is not None:
        label, share = clustering.majority(cluster)
        text += f", {100 * share:.0f} % class {source.classes[label][:24]}"
    return text


def save_overview(source: ImageSource, clustering: Clustering, path: Path) -> Path:
    """The most confident images of the largest clusters, two clusters side by side."""
    clusters = clustering.largest_first()
    tiles = []
    for cluster in clusters[:OVERVIEW_CLUSTERS]:
        title = f"cluster {cluster}: {describe_cluster(source, clustering, cluster)}"
        tiles.append(tile_of(source, clustering, clustering.members(cluster)[:STRIP], STRIP, title))
    rows = [beside(tiles[i : i + 2]) for i in range(0, len(tiles), 2)]
    which = f"The {len(tiles)} largest of {len(clusters):,}" if len(tiles) < len(clusters) else f"All {len(clusters):,}"
    notes = [f"{which} clusters, the most confident images first; {len(clustering.clusters):,} images in all."]
    if clustering.labels is not None:
        notes.append("Red frame: not of the class that most images of the cluster belong to.")
    return save_sheet(rows, path, "\n".join(["Clusters", *notes]), [row[0].pixels.shape[0] / DPI for row in rows])


def save_sheets(
    source: ImageSource, clustering: Clustering, folder: Path, images_per_sheet: int, max_sheets: int | None
) -> list[Path]:
    """A contact sheet for each cluster, the largest first; sheets of an earlier clustering in the folder go."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("cluster_*.png"):
        old.unlink()
    clusters = clustering.largest_first()[:max_sheets]
    digits = len(str(clustering.num_clusters - 1))
    hidden = not sys.stderr.isatty()
    return [
        save_contact_sheet(source, clustering, cluster, folder / f"cluster_{cluster:0{digits}d}.png", images_per_sheet)
        for cluster in tqdm(clusters, desc="contact sheets", leave=False, disable=hidden)
    ]


def save_contact_sheet(source: ImageSource, clustering: Clustering, cluster: int, path: Path, most_images: int) -> Path:
    """All images of a cluster, or its most confident ones and a row of the least confident."""
    members = clustering.members(cluster)
    confidences = clustering.confidences[members]
    columns = min(COLUMNS, most_images)
    if len(members) <= most_images:
        title = f"all of them, confidence {confidences[0]:.2f} to {confidences[-1]:.2f}"
        tiles = [tile_of(source, clustering, members, columns, title)]
    else:
        few = min(DOUBTFUL_ROWS * columns, most_images // 2)
        many = most_images - few
        title = f"the {many} most confident, {confidences[0]:.2f} to {confidences[many - 1]:.2f}"
        tiles = [tile_of(source, clustering, members[:many], columns, title)]
        if few:
            title = f"the {few} least confident, {confidences[-few]:.2f} to {confidences[-1]:.2f}"
            tiles.append(tile_of(source, clustering, members[-few:], columns, title))
    notes = [describe_cluster(source, clustering, cluster)]
    if clustering.labels is not None:
        notes.append("Red frame: another class.")
    heading = "\n".join([f"Cluster {cluster}", *notes])
    return save_sheet([[tile] for tile in tiles], path, heading, [tile.pixels.shape[0] / DPI for tile in tiles])


def save_usage(clustering: Clustering, path: Path) -> Path:
    """Images per prototype beside an equal partition, and the confidence of the assignments."""
    counts = np.sort(np.bincount(clustering.prototypes, minlength=clustering.num_prototypes))[::-1]
    k, n = len(counts), len(clustering.clusters)
    ranks = np.arange(1, k + 1)
    confidences = np.sort(clustering.confidences)[::-1]
    shares = 100 * np.arange(1, n + 1) / n
    dead = int((counts == 0).sum())
    panels = [
        Panel(
            f"{k - dead:,} of {k:,} prototypes are used, {dead:,} are dead",
            "prototypes, the most used first",
            "images",
            [Curve(ranks, counts, "images of a prototype"), Curve([1, k], [n / k] * 2, "equal partition", "reference")],
        ),
        Panel(
            "Confidence of the assignments",
            "images, the most confident first (%)",
            "probability of the cluster",
            [
                Curve(shares, confidences, "confidence"),
                Curve([0, 100], [1 / clustering.num_clusters] * 2, "a guess", "reference"),
            ],
        ),
    ]
    return save_panels(panels, path, "Use of the prototypes")
