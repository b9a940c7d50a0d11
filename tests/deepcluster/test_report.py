import csv

import numpy as np
import pytest
import torch
from PIL import Image

from deepcluster.clustering import Clusters
from deepcluster.report import HEALTH_RULES, purity
from shared.evaluation.partitions import describe_partition, save_list
from shared.images.sources import ArraySource, open_source
from shared.run.health import HealthMonitor


def source_of(labels, classes=("cat", "dog")):
    pixels = np.random.default_rng(0).integers(0, 256, size=(len(labels), 8, 8), dtype=np.uint8)
    return ArraySource("noise", pixels, np.array(labels), classes)


def test_every_image_is_listed_with_its_cluster_and_class(tmp_path):
    path = save_list(source_of([0, 1, 1]), {"cluster": torch.tensor([2, 0, 2])}, tmp_path / "clusters.csv")
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    assert rows.pop(0) == ["image", "cluster", "class"]
    assert rows == [["noise[0]", "2", "cat"], ["noise[1]", "0", "dog"], ["noise[2]", "2", "dog"]]


def test_names_with_commas_and_odd_bytes_are_listed(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a,b.png", 'quote".png', b"caf\xe9.png".decode("utf-8", "surrogateescape")):
        Image.new("RGB", (4, 4)).save(folder / name, format="PNG")
    source = open_source(str(folder))
    path = save_list(source, {"cluster": torch.tensor([0, 1, 0])}, tmp_path / "clusters.csv")
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [row["image"] for row in csv.DictReader(file)] == [source.path(i) for i in range(3)]


def test_purity_is_the_share_of_the_most_frequent_classes():
    assignments, labels = torch.tensor([0, 0, 0, 2, 2, 5]), np.array([1, 1, 0, 0, 1, 1])
    assert purity(assignments, labels) == pytest.approx((2 + 1 + 1) / 6)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ([0, 30, 0], "all images are in one cluster"),
        ([40, 3, 3, 4], "the largest cluster holds 40 of 50 images"),
        ([10, 10, 10, 0, 0, 0, 0], "only 3 clusters have images and 4 have none"),
        ([10, 9, 8, 0], None),
    ],
)
def test_trivial_clusters_are_told_in_one_sentence_with_a_flag(sizes, sentence):
    clusters = Clusters(torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)), len(sizes))
    line = describe_partition(clusters.assignments, len(sizes), None, source_of([0] * sum(sizes)))
    found = HealthMonitor(HEALTH_RULES).check({"step": 0, "images": sum(sizes), **line})
    if sentence is None:
        assert found is None
    else:
        assert sentence in found and "--" in found


@pytest.mark.parametrize(("loss", "clusters", "is_told"), [(4.6, 100, True), (4.5, 100, False), (0.0, 1, False)])
def test_a_loss_that_stays_at_that_of_a_guess_is_told(loss, clusters, is_told):
    line = {"step": 9, "clusters": clusters, "train_loss": loss}
    found = HealthMonitor(HEALTH_RULES).check(line)
    assert (found is not None and "loss 4.600" in found) == is_told
