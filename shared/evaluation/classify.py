"""Labels for all your images from a few of them, by classifiers of their features.

    python -m shared.evaluation.classify features.parquet --labels labels.csv --out predictions.csv

``labels.csv`` has a line ``image,label`` for each labelled image; an image is named by its path, by the end of its path
or by its file name, whichever is unique. Cross-validation over the labelled images says what three classifiers of
frozen features are worth: a linear one (logistic regression), the weighted vote of nearest neighbours, and the nearest
mean of a class. The one with the highest accuracy labels all others. ``predictions.csv`` has image, label and
confidence, the linear classifier's probability of that label, as PAWS's pseudo-labels have; the most certain come
first. ``label_next.csv`` and ``label_next.png`` are the images whose labels would tell most: the linear classifier is
undecided between two classes, and they differ from each other.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from shared import distributed
from shared.evaluation.feature_files import read_all
from shared.evaluation.knn import count_votes, nearest_neighbours
from shared.images.sources import FileSource
from shared.images.tables import label_of_each, read_labels, write_table
from shared.pictures.sheets import Tile, save_sheet, thumbnail
from shared.run.flags import Parser

INVERSE_REGULARISATION = (
    300.0  # of the logistic regression on unit vectors: probabilities that are about as often right
)
NEIGHBOURS = 5
FOLDS = 5
COLUMNS = 8  # of the picture
UNDECIDED = 5  # times as many undecided images as asked for are candidates, of which those that differ are taken


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("features", nargs="+", help="files of extract_features")
    parser.add_argument("--labels", required=True, help="CSV or TSV file of image and label")
    choices = ("best", *CLASSIFIERS)
    parser.add_argument("--classifier", default="best", choices=choices, help="that labels the other images")
    parser.add_argument("--next", type=int, default=16, help="number of images to label next")
    parser.add_argument("--seed", type=int, default=0, help="of the parts of the cross-validation")
    parser.add_argument("--out", default="predictions.csv", help="image, label, confidence; label_next.* go beside it")
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    args = parser.parse_args(arguments)
    if args.next < 0:
        parser.error(f"--next {args.next} is negative")
    if Path(args.out).suffix != ".csv":
        parser.error(f"--out {args.out} does not end in .csv")
    return args


# --- Classifiers: unit vectors (N, D), their classes (N,), the number of classes and unit vectors (M, D) -> (M, C) ----


def linear(train: np.ndarray, classes: np.ndarray, num_classes: int, test: np.ndarray) -> np.ndarray:
    model = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=2000).fit(train, classes)
    scores = np.zeros((len(test), num_classes))
    scores[:, model.classes_] = model.predict_proba(test)
    return scores


def knn(train: np.ndarray, classes: np.ndarray, num_classes: int, test: np.ndarray) -> np.ndarray:
    k = min(NEIGHBOURS, len(train))
    similarities, rows = nearest_neighbours(torch.from_numpy(test), torch.from_numpy(train), k)
    return count_votes(similarities, torch.from_numpy(classes)[rows], num_classes).numpy()


def nearest_mean(train: np.ndarray, classes: np.ndarray, num_classes: int, test: np.ndarray) -> np.ndarray:
    scores = np.full((len(test), num_classes), -np.inf)
    for c in np.unique(classes):
        mean = train[classes == c].mean(axis=0)
        scores[:, c] = test @ (mean / max(np.linalg.norm(mean), 1e-12))
    return scores


CLASSIFIERS: dict[str, Callable] = {"linear": linear, "knn": knn, "nearest_mean": nearest_mean}


def cross_validate(vectors: np.ndarray, classes: np.ndarray, num_classes: int, seed: int) -> dict[str, np.ndarray]:
    """Whether each labelled image is classified rightly by the others, for every classifier.

    Classes of a single image count as wrong: no other image can name them.
    """
    right = {name: np.zeros(len(classes), dtype=bool) for name in CLASSIFIERS}
    counts = np.bincount(classes)[classes]
    folds = int(np.clip(counts[counts > 1].min(initial=FOLDS), 2, FOLDS))
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    several = np.flatnonzero(counts > 1)
    for train, test in splits.split(several, classes[several]) if len(several) else ():
        train = np.concatenate([several[train], np.flatnonzero(counts == 1)])
        test = several[test]
        if len(np.unique(classes[train])) > 1:
            for name, classify_by in CLASSIFIERS.items():
                scores = classify_by(vectors[train], classes[train], num_classes, vectors[test])
                right[name][test] = scores.argmax(axis=1) == classes[test]
    return right


# --- What to label next -----------------------------------------------------------------------------------------------


def choose_next(vectors: np.ndarray, probabilities: np.ndarray, number: int) -> list[int]:
    """Undecided images that differ from each other.

    Of the images with the smallest margin between the two most probable classes, each one taken is the least like those
    taken before.

    Args:
        vectors: Unit vectors (N, D).
        probabilities: Of the classes, (N, C).
    """
    first, second = np.sort(probabilities, axis=1)[:, :-3:-1].T
    candidates = np.argsort(first - second, kind="stable")[: UNDECIDED * number]
    if not len(candidates) or not number:
        return []
    chosen = [candidates[0]]
    nearest = vectors[candidates] @ vectors[chosen[0]]
    while len(chosen) < min(number, len(candidates)):
        nearest[np.isin(candidates, chosen)] = np.inf
        chosen.append(candidates[nearest.argmin()])
        nearest = np.maximum(nearest, vectors[candidates] @ vectors[chosen[-1]])
    return [int(i) for i in chosen]


def classify(args: argparse.Namespace) -> dict[str, float]:
    """Print what the classifiers are worth, label the other images, and return the accuracies in percent."""
    features, out = read_all(args.features), Path(args.out)
    labels = label_of_each(read_labels(args.labels, features.paths, "among the images of the features"))
    names = sorted(set(labels.values()))
    if len(names) < 2:
        raise ValueError(
            f"--labels {args.labels}: {len(labels)} labelled images of {len(names)} classes; two are needed"
        )
    rows = np.array(sorted(labels))
    classes = np.array([names.index(labels[row]) for row in rows])
    vectors = features.embeddings[rows]

    counts = np.bincount(classes)
    print(f"{len(rows):,} labelled images of {len(names)} classes, {len(features.paths) - len(rows):,} others")
    if alone := [names[c] for c in np.flatnonzero(counts == 1)]:
        print(f"NOTE: classes with a single labelled image count as wrong in the accuracies: {', '.join(alone)}")
    accuracies = {}
    print(f"\ncross-validated accuracy of the labelled images, +- two standard errors\n{'':14}accuracy")
    for name, right in cross_validate(vectors, classes, len(names), args.seed).items():
        accuracies[name] = 100 * right.mean()
        print(
            f"{name:14}{accuracies[name]:5.1f} +- {200 * math.sqrt(right.mean() * (1 - right.mean()) / len(right)):.1f}"
        )
    print(f"{'largest class':14}{100 * counts.max() / counts.sum():5.1f}\n")
    chosen = max(accuracies, key=accuracies.get) if args.classifier == "best" else args.classifier

    others = np.setdiff1d(np.arange(len(features.paths)), rows)
    if len(others):
        fitted = vectors, classes, len(names), features.embeddings[others]
        probabilities = linear(*fitted)
        found = CLASSIFIERS[chosen](*fitted).argmax(axis=1)
        confidences = probabilities[np.arange(len(others)), found]
        table = [
            (features.paths[others[i]], names[found[i]], f"{confidences[i]:.4f}")
            for i in np.argsort(-confidences, kind="stable")
        ]
        print(f"labels by {chosen}: {write_table(out, ['image', 'label', 'confidence'], table)}")
        _write_next(args.next, others, features.embeddings, probabilities, names, features.paths, out)
    return accuracies


def _write_next(number, others, embeddings, probabilities, names, paths, out: Path) -> None:
    chosen = choose_next(embeddings[others], probabilities, number)
    if not chosen:
        return
    best = np.argsort(-probabilities[chosen], axis=1)[:, :2]
    table = [(paths[others[i]], *(names[c] for c in pair)) for i, pair in zip(chosen, best, strict=True)]
    file = write_table(out.with_name("label_next.csv"), ["image", "label", "or"], table)
    source = FileSource("", "", paths)
    tiles = [
        Tile(thumbnail(source, int(others[i])), title=first[:16], caption=f"or {second[:14]}")
        for i, (_, first, second) in zip(chosen, table, strict=True)
    ]
    sheet = [tiles[i : i + COLUMNS] for i in range(0, len(tiles), COLUMNS)]
    heading = "Images to label next\nThe classifier is undecided between the two classes."
    print(f"to label next:  {file}, {save_sheet(sheet, out.with_name('label_next.png'), heading)}")


def main() -> None:
    distributed.run_script(classify, parse_args)


if __name__ == "__main__":
    main()
