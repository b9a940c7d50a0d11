"""Clusters of your own images, from their features.

    python -m shared.evaluation.clusters features.parquet --clusters 20 --out clusters

k-means of the features at unit length, or with ``--method hdbscan`` regions that are denser than what surrounds them,
whose number need not be chosen; images between them are in no cluster (-1). Clusters are numbered from the largest one.
Writes ``clusters.csv`` (cluster, path, cosine to the cluster's mean), ``overview.png``, a contact sheet per cluster in
``sheets/`` and with ``--links true`` a folder of links per cluster in ``links/``.
"""

import argparse
import contextlib
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
from sklearn import cluster, metrics

from shared import distributed
from shared.evaluation.feature_files import read_all
from shared.images.sources import FileSource
from shared.images.tables import write_table
from shared.pictures.sheets import Tile, link_images, save_sheet, thumbnail
from shared.run.flags import Parser, bool_flag

COLUMNS = 10  # of a sheet
ROWS = 6
SHOWN = 20  # clusters of the overview
NO_CLUSTER = -1


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("features", nargs="+", help="files of extract_features")
    parser.add_argument("--method", default="kmeans", choices=("kmeans", "hdbscan"), help="of scikit-learn")
    number = "clusters of k-means; None: the square root of half the number of images"
    parser.add_argument("--clusters", type=int, default=None, help=number)
    parser.add_argument("--min_cluster_size", type=int, default=10, help="of hdbscan: images of the smallest cluster")
    parser.add_argument("--seed", type=int, default=0, help="of the first means of k-means")
    parser.add_argument("--links", type=bool_flag, default=False, help="also write folders of links to the images")
    parser.add_argument("--out", default="clusters", help="folder to write; what an earlier call wrote is replaced")
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    args = parser.parse_args(arguments)
    if args.clusters is not None and args.clusters < 2:
        parser.error(f"--clusters {args.clusters} is less than 2")
    if args.min_cluster_size < 2:
        parser.error(f"--min_cluster_size {args.min_cluster_size} is less than 2")
    if args.method == "hdbscan" and args.clusters is not None:
        parser.error(f"--clusters {args.clusters} is for --method kmeans; hdbscan finds their number itself")
    return args


def find_clusters(vectors: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """Cluster of each unit vector (N, D): 0 is the largest one, and -1 none.

    Raises:
        ValueError: If there are fewer images than clusters.
    """
    if args.method == "hdbscan":
        smallest = args.min_cluster_size
        if len(vectors) < smallest:
            raise ValueError(f"--min_cluster_size {smallest}: there are {len(vectors)} images")
        found = cluster.HDBSCAN(min_cluster_size=smallest, copy=True).fit_predict(vectors)
    else:
        number = args.clusters or max(2, round((len(vectors) / 2) ** 0.5))
        if number > len(vectors):
            raise ValueError(f"--clusters {number}: there are {len(vectors)} images")
        found = cluster.KMeans(number, n_init=4, random_state=args.seed).fit_predict(vectors)
    numbers, sizes = np.unique(found[found != NO_CLUSTER], return_counts=True)
    rank = dict(zip(numbers[np.argsort(-sizes, kind="stable")], range(len(numbers)), strict=True))
    return np.array([rank.get(number, NO_CLUSTER) for number in found])


def clusters(args: argparse.Namespace) -> np.ndarray:
    """Write the clusters and their pictures, and return the cluster of each image."""
    features, out = read_all(args.features), Path(args.out)
    vectors, found = features.embeddings, find_clusters(features.embeddings, args)
    members, cosines = [], np.zeros(len(found))  # of each cluster, the most typical image first
    for number in range(found.max() + 1):
        rows = np.flatnonzero(found == number)
        mean = vectors[rows].mean(axis=0)
        cosines[rows] = vectors[rows] @ (mean / max(np.linalg.norm(mean), 1e-12))
        members.append(rows[np.argsort(-cosines[rows], kind="stable")])
    outside = np.flatnonzero(found == NO_CLUSTER)
    sizes = [len(rows) for rows in members]
    print(f"{len(found):,} images, {len(members):,} clusters of {min(sizes, default=0):,} to {max(sizes, default=0):,}")
    if len(outside):
        print(f"{len(outside):,} images are in no cluster")
    if features.labels is not None:
        print(f"agreement with the labels: NMI {metrics.normalized_mutual_info_score(features.labels, found):.3f}")

    _remove_earlier(out)
    order = np.concatenate([*members, outside])
    rows = [(found[i], features.paths[i], "" if found[i] == NO_CLUSTER else f"{cosines[i]:.4f}") for i in order]
    print(f"clusters: {write_table(out / 'clusters.csv', ['cluster', 'path', 'similarity'], rows)}")
    if members:
        _draw(features.paths, members, out)
    if args.links:
        names = [f"cluster_{number:04}" for number in range(len(members))]
        groups = dict(zip([*names, "no_cluster"], [*members, outside], strict=True))
        print(f"links:    {link_images(FileSource('', '', features.paths), groups, out / 'links')}")
    return found


def _remove_earlier(out: Path) -> None:
    """Sheets and links that an earlier call has written; whatever else is there stays."""
    for sheet in (out / "sheets").glob("cluster_*.png"):
        sheet.unlink()
    links = out / "links"
    for folder in (*links.glob("cluster_*"), links / "no_cluster", links):
        for link in folder.glob("*") if folder != links else ():
            if link.is_symlink():
                link.unlink()
        with contextlib.suppress(OSError):  # what is not empty, or not there
            folder.rmdir()


def _draw(paths: list[str], members: list[np.ndarray], out: Path) -> None:
    source = FileSource("", "", paths)

    def tiles(rows: np.ndarray) -> list[Tile]:
        return [Tile(thumbnail(source, i)) for i in rows]

    shown = [tiles(rows[:COLUMNS]) for rows in members[:SHOWN]]
    for number, row in enumerate(shown):
        row[0].title = f"{number}: {len(members[number]):,} images"
    heading = f"The {len(shown)} largest of {len(members):,} clusters\nThe most typical images of each cluster first."
    print(f"pictures: {save_sheet(shown, out / 'overview.png', heading)}, {out / 'sheets'}")
    (out / "sheets").mkdir(exist_ok=True)
    for number, rows in enumerate(members):
        few = rows[: COLUMNS * ROWS]
        heading = f"Cluster {number}: {len(rows):,} images\nThe most typical ones first" + (
            "." if len(few) == len(rows) else f"; {len(few)} are shown."
        )
        sheet = [tiles(few[i : i + COLUMNS]) for i in range(0, len(few), COLUMNS)]
        save_sheet(sheet, out / "sheets" / f"cluster_{number:04}.png", heading)


def main() -> None:
    distributed.run_script(clusters, parse_args)


if __name__ == "__main__":
    main()
