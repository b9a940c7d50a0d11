from pathlib import Path

import pytest

from shared.run.summary import ROOT, accuracy, command, verdict, without_labels

LOG = [{"step": 0, "knn": 30.0}, {"step": 20, "loss": 6.2}, {"step": 30, "knn": 42.5}]


@pytest.mark.parametrize(
    ("before", "after", "images", "words"),
    [
        (30.0, 42.5, 1000, "learned"),
        (30.0, 42.5, 40, "not distinguishable from random weights"),  # two standard errors: 15.2
        (90.0, 90.0, 1000, "not distinguishable from random weights"),
        (0.0, 100.0, 12, "learned"),
        (25.8, 16.1, 359, "worse than random weights: train longer (--epochs), or with a lower --base_lr"),
    ],
)
def test_only_numbers_that_differ_by_more_than_chance_are_called_learned(before, after, images, words):
    assert verdict(before, {"top1": after}, "top1", images, "--base_lr", "random weights").startswith(words)


def test_an_accuracy_is_told_with_that_before_and_what_follows():
    trained = "42.5 +- 3.1 % after 30 steps (chance 33.3 %): learned"
    sentence = f"k-NN on val: 30.0 +- 2.9 % with random weights, {trained}"
    assert accuracy(LOG, "knn", "k-NN on val", 1000, 3) == [sentence]
    assert accuracy(LOG[2:], "knn", "k-NN on val", 1000, 3)[0].endswith(f"k-NN on val: {trained}")
    assert accuracy(LOG[:1], "knn", "k-NN on val", 1000, 3)[0].endswith("with random weights (chance 33.3 %)")
    assert accuracy(LOG, "top1", "top-1", 1000, 3) == []


def test_measures_without_labels_are_told_beside_those_of_raw_pixels_with_a_verdict():
    before = {"recall_at_1": 20.0, "rankme": 13.52, "pixels_recall_at_1": 8.0, "pixels_rankme": 115.9}
    log = [{"step": 0, **before}, {"step": 9, "recall_at_1": 21.0}, {"step": 30, "recall_at_1": 36.0, "rankme": 40.0}]
    assert without_labels(log, "200 images of photos", 200) == [
        "found again from a mirrored half, 200 images of photos: 20.0 +- 5.7 % with random weights, 8.0 +- 3.9 % of "
        "raw pixels, 36.0 +- 6.8 % after 30 steps (chance 0.5 %): learned",
        "RankMe, effective dimensions of these features: 13.5 with random weights, 40.0 after 30 steps, 115.9 of raw "
        "pixels",
    ]
    worse = [log[2] | {"step": 0}, log[0] | {"step": 30}]
    assert "less than with random weights: images became alike" in without_labels(worse, "images", 200)[0]
    assert without_labels([{"step": 30, "knn_top1": 4.0}], "images", 200) == []


def test_commands_can_be_pasted_where_the_run_was_started(monkeypatch, tmp_path):
    flags = {"arch": "vit", "image_size": None, "data_path": Path("/my images"), "size": [1, 2], "eval": True}
    expected = "--arch vit --data_path '/my images' --size 1 2 --eval"
    for folder, script in ((ROOT, "dino/eval_knn.py"), (ROOT / "dino", "eval_knn.py"), (tmp_path, None)):
        monkeypatch.chdir(folder)
        script = script or ROOT / "dino/eval_knn.py"
        assert command("dino/eval_knn.py", "IMAGES", **flags, full=False) == f"python {script} IMAGES {expected}"
