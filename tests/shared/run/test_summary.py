from pathlib import Path

import pytest

from shared.run.summary import ROOT, command, verdict


@pytest.mark.parametrize(
    ("before", "after", "images", "steps", "words"),
    [
        (30.0, 42.5, 1000, 50, "learned"),
        (30.0, 42.5, 1000, 49, "more than with random weights; so few steps do not tell learning from batch norms"),
        (30.0, 42.5, 40, 50, "not distinguishable from random weights"),  # two standard errors: 15.2
        (90.0, 90.0, 1000, 50, "not distinguishable from random weights"),
        (0.0, 100.0, 12, 50, "learned"),
        (25.8, 16.1, 359, 50, "worse than random weights: train longer, or with a lower --base_lr"),
    ],
)
def test_only_numbers_that_differ_by_more_than_chance_are_called_learned(before, after, images, steps, words):
    line = {"step": steps, "top1": after}
    assert verdict(before, line, "top1", images, "--base_lr", "random weights").startswith(words)


@pytest.mark.parametrize(("rankme", "steps", "words"), [(88, 50, "in clusters, as"), (20, 20, "in a collapse, as")])
def test_what_became_alike_is_told_by_the_rank(rankme, steps, words):
    line = {"step": steps, "recall_at_1": 8.7, "rankme": rankme}
    found = verdict(30.0, line, "recall_at_1", 149, "--lr", "random weights", 39.0)
    assert found.startswith(f"less than with random weights: images became alike, {words} RankMe has ")
    assert found.endswith("so few steps say little") == (steps < 50)


def test_commands_can_be_pasted_where_the_run_was_started(monkeypatch, tmp_path):
    flags = {"arch": "vit", "image_size": None, "data_path": Path("/my images"), "size": [1, 2], "eval": True}
    expected = "--arch vit --data_path '/my images' --size 1 2 --eval"
    for folder, script in ((ROOT, "dino/eval_knn.py"), (ROOT / "dino", "eval_knn.py"), (tmp_path, None)):
        monkeypatch.chdir(folder)
        script = script or ROOT / "dino/eval_knn.py"
        assert command("dino/eval_knn.py", "IMAGES", **flags, full=False) == f"python {script} IMAGES {expected}"
