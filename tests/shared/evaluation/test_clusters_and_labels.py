"""Clusters of a person's own images, and labels for them from a few."""

import csv
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.evaluation import classify, clusters
from shared.evaluation.feature_files import Features, write_features
from tests.shared.photographs import photograph

NAMES = ("cat", "dog", "eel")


@pytest.fixture
def pool(tmp_path):
    """60 images of three classes of 30, 20 and 10, whose features lie around three directions."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((8, 8)))[0][:3]
    kinds = [0] * 30 + [1] * 20 + [2] * 10
    paths = []
    for i in range(60):
        path = tmp_path / "photos" / ("a" if i % 2 else "b") / f"{i // 2}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(i, 16, 16)).save(path)
        paths.append(str(path))
    vectors = directions[kinds] + 0.1 * rng.standard_normal((60, 8))
    features = Features(paths, [NAMES[kind] for kind in kinds], (3 * vectors).astype(np.float32))
    write_features(tmp_path / "f.npz", features)
    return features


def find_clusters(folder, *flags) -> np.ndarray:
    return clusters.clusters(
        clusters.parse_args([str(folder / "f.npz"), "--out", str(folder / "out"), *map(str, flags)])
    )


def label_images(folder, rows, *flags) -> dict[str, float]:
    with open(folder / "labels.csv", "w") as file:
        csv.writer(file).writerows(rows)
    flags = ("--labels", folder / "labels.csv", "--out", folder / "predictions.csv", *flags)
    return classify.classify(classify.parse_args([str(folder / "f.npz"), *map(str, flags)]))


def read(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("flags", [("--clusters", 3), ("--method", "hdbscan", "--min_cluster_size", 5)])
def test_clusters_are_numbered_from_the_largest_and_drawn(flags, pool, tmp_path, capsys):
    found = find_clusters(tmp_path, *flags, "--links", "true")
    named = [(pool.labels[i], number) for i, number in enumerate(found) if number != clusters.NO_CLUSTER]
    assert set(named) == {("cat", 0), ("dog", 1), ("eel", 2)} and len(named) >= 54
    assert "agreement with the labels: NMI " in capsys.readouterr().out
    rows = read(tmp_path / "out" / "clusters.csv")
    assert Counter(int(row["cluster"]) for row in rows) == Counter(found.tolist())
    assert {row["path"] for row in rows} == set(pool.paths)
    cosines = [float(row["similarity"]) for row in rows if row["cluster"] == "1"]
    assert cosines == sorted(cosines, reverse=True) and cosines[-1] > 0.8
    sheets = sorted((tmp_path / "out" / "sheets").iterdir())
    assert len(sheets) == 3 and Image.open(sheets[0]).height > Image.open(sheets[2]).height
    links = sorted((tmp_path / "out" / "links" / "cluster_0001").iterdir())
    assert len(links) == np.sum(found == 1) and os.path.realpath(links[0]) in pool.paths
    own = [tmp_path / "out" / "sheets" / "mine.txt", tmp_path / "out" / "links" / "mine.txt"]
    own[0].write_text("stays")
    own[1].symlink_to(own[0])
    find_clusters(tmp_path, "--clusters", 2)
    assert len(list(own[0].parent.iterdir())) == 3 and list(own[1].parent.iterdir()) == [own[1]]


def test_few_labels_name_the_other_images(pool, tmp_path, capsys):
    labelled = [0, 1, 2, 30, 31, 32, 50, 51, 52]
    rows = [["image", "label"], *([f"{'a' if i % 2 else 'b'}/{i // 2}.png", pool.labels[i]] for i in labelled)]
    accuracies = label_images(tmp_path, rows, "--next", 4)
    assert accuracies == {"linear": 100, "knn": 100, "nearest_mean": 100}
    printed = capsys.readouterr().out
    assert "9 labelled images of 3 classes, 51 others" in printed and "largest class  33.3" in printed
    found = read(tmp_path / "predictions.csv")
    assert {row["image"]: row["label"] for row in found} == {
        path: label for i, (path, label) in enumerate(zip(pool.paths, pool.labels, strict=True)) if i not in labelled
    }
    confidences = [float(row["confidence"]) for row in found]
    assert confidences == sorted(confidences, reverse=True) and 1 / 3 < confidences[-1] < confidences[0] <= 1
    asked = read(tmp_path / "label_next.csv")
    assert len(asked) == 4 and asked[0]["image"] in [row["image"] for row in found[-8:]]
    assert all(row["label"] != row["or"] for row in asked) and (tmp_path / "label_next.png").exists()


def test_accuracies_of_labels_that_mean_nothing_are_chance(tmp_path):
    rng = np.random.default_rng(0)
    right = classify.cross_validate(
        *(normalise(rng.standard_normal((600, 16)).astype(np.float32)), rng.integers(3, size=600)), 3, seed=0
    )
    assert all(abs(values.mean() - 1 / 3) < 0.06 for values in right.values())


def test_a_class_of_one_image_counts_as_wrong(pool, tmp_path, capsys):
    rows = [[pool.paths[i], pool.labels[i]] for i in (0, 1, 30, 31, 50)]
    assert label_images(tmp_path, rows, "--next", 0)["nearest_mean"] == 80
    assert "a single labelled image count as wrong in the accuracies: eel" in capsys.readouterr().out
    assert not (tmp_path / "label_next.csv").exists()


def test_a_class_of_one_image_leaves_the_others_their_folds():
    """Of two classes of ten images a fifth is left out at a time, never a half."""
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify, "CLASSIFIERS", {"size": lambda train, *_: sizes.append(len(train)) or np.zeros((4, 3))})
        classify.cross_validate(np.eye(21), np.repeat([0, 1, 2], [10, 10, 1]), 3, seed=0)
    assert sizes == [17] * 5


def test_images_to_label_next_are_undecided_and_differ():
    """Images 0 to 5 are undecided, 0 to 2 are nearly the same; of 2 one is among them."""
    vectors = normalise(np.array([[1, 0], [1, 0.01], [1, 0.02], [0, 1], [-1, 0], [0, -1]] + [[1, 1]] * 20, dtype=float))
    margins = np.array([0, 0.01, 0.02, 0.03, 0.04, 0.05] + [0.9] * 20)
    probabilities = np.stack([0.5 + margins / 2, 0.5 - margins / 2], axis=1)
    chosen = classify.choose_next(vectors, probabilities, 2)
    assert chosen == [0, 4]


def normalise(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [["a/0.png", "x"], ["c/9.png", "y"]],
            r"labels.csv, line 2: 'c/9.png' is not among the images of the features.*1 of the 2",
        ),
        (
            [["0.png", "x"], ["a/1.png", "y"]],
            "'0.png' is not among the images of the features, or several images have that name",
        ),
        ([["a/0.png", "x"], ["a/0.png", "y"]], "a/0.png has the label 'x' already"),
        ([["a/0.png", "x"], ["a/1.png", "x"]], "2 labelled images of 1 classes"),
        ([["a/0.png", "x", "1"]], "line 1: expected an image and its label"),
        ([["a/0.png", "x"], ["a/1.png", ""]], "line 2: expected an image and its label"),
    ],
)
def test_labels_that_do_not_fit_are_one_sentence(rows, message, pool, tmp_path):
    with pytest.raises(ValueError, match=message):
        label_images(tmp_path, rows)
