"""Near-duplicates among your own images, from their features.

    python -m shared.evaluation.near_duplicates features.parquet --threshold 0.95 --out duplicates.csv

Two images are linked if the cosine of their features is at least the threshold, and a group is what links connect, so
that two of its images may be less alike. Which cosine means "the same" depends on the network and on the images: the
table says what other thresholds would find. Where one of them puts most images into one group, choose a higher one.
Several files are searched together, such as train and test images. ``duplicates.png`` shows the largest groups.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from shared import distributed
from shared.evaluation.feature_files import read_all
from shared.images.sources import FileSource
from shared.images.tables import write_table
from shared.pictures.sheets import Tile, save_sheet, thumbnail
from shared.run.flags import Parser

THRESHOLDS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # of the table, besides the one asked for
BLOCK = 1 << 24  # similarities that are held at once
ROUNDING = 1e-6  # of a cosine in float32
GROUPS, IMAGES = 20, 8  # of the picture, at most


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("features", nargs="+", help="files of extract_features")
    parser.add_argument("--threshold", type=float, default=0.95, help="least cosine of two linked images")
    parser.add_argument("--out", default="duplicates.csv", help="group, path, similarity to the group's first image")
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    args = parser.parse_args(arguments)
    if not 0 < args.threshold <= 1:
        parser.error(f"--threshold {args.threshold} is outside (0, 1]")
    if Path(args.out).suffix != ".csv":
        parser.error(f"--out {args.out} does not end in .csv")
    return args


def find_groups(vectors: Tensor, thresholds: Sequence[float]) -> dict[float, list[list[int]]]:
    """Groups of at least two of the unit vectors (N, D) for each threshold, the largest ones first.

    All pairs are compared, a block at a time: memory grows with N, not with its square.
    """
    labels, start = {threshold: np.arange(len(vectors)) for threshold in thresholds}, 0
    while start < len(vectors):
        block = vectors[start : start + max(1, BLOCK // (len(vectors) - start))]
        cosines = (block @ vectors[start:].T).numpy()
        for threshold, label in labels.items():
            if not label.any():
                continue  # all images are in one group
            first, second = start + np.array(np.nonzero(np.triu(cosines >= threshold - ROUNDING, k=1)))
            edges = np.ones(len(first), dtype=bool), (label[first], label[second])
            graph = sparse.coo_array(edges, shape=(len(vectors), len(vectors)))
            labels[threshold] = sparse.csgraph.connected_components(graph, directed=False)[1][label]
        start += len(block)
    return {threshold: _members(label) for threshold, label in labels.items()}


def _members(labels: np.ndarray) -> list[list[int]]:
    order = np.argsort(labels, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return sorted((part.tolist() for part in parts if len(part) > 1), key=lambda part: (-len(part), part[0]))


def near_duplicates(args: argparse.Namespace) -> list[list[int]]:
    """Print the table, write the groups and their picture, and return the groups."""
    features = read_all(args.features)
    paths, vectors = features.paths, torch.from_numpy(features.embeddings)
    by_threshold = find_groups(vectors, sorted({*THRESHOLDS, args.threshold}))
    print(f"{len(paths):,} images\nthreshold   groups   images in them   largest group")
    for threshold, groups in by_threshold.items():
        sizes = [len(group) for group in groups]
        mark = "  <- --threshold" if threshold == args.threshold else ""
        print(f"{threshold:9g} {len(sizes):8,} {sum(sizes):16,} {max(sizes, default=0):15,}{mark}")
    groups, out = by_threshold[args.threshold], Path(args.out)
    similarities = [(vectors[group] @ vectors[group[0]]).tolist() for group in groups]
    rows = [
        (number, paths[i], f"{value:.4f}")
        for number, (group, values) in enumerate(zip(groups, similarities, strict=True), start=1)
        for i, value in zip(group, values, strict=True)
    ]
    write_table(out, ["group", "path", "similarity"], rows)
    print(f"{len(groups):,} groups: {out}")
    if 2 * sum(map(len, groups)) > len(paths):
        print(f"WARNING: most images are in groups: copies, or features that are too alike at {args.threshold:g}")
    if groups:
        source = FileSource("", "", paths)
        rows = [
            [Tile(thumbnail(source, i), caption=f"{v:.3f}") for i, v in zip(group[:IMAGES], values, strict=False)]
            for group, values in zip(groups[:GROUPS], similarities, strict=False)
        ]
        heading = f"Near-duplicates: {len(groups):,} groups at a threshold of {args.threshold:g}, the largest ones"
        print(save_sheet(rows, out.with_suffix(".png"), f"{heading}\nThe number is the cosine with the row's first."))
    return groups


def main() -> None:
    distributed.run_script(near_duplicates, parse_args)


if __name__ == "__main__":
    main()
