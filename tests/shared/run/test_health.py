"""What a run says of its health, its settings and its result."""

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.optimisation.schedules import cosine_schedule
from shared.run.health import HealthMonitor, HealthRule, feature_spread, rank_me
from shared.run.settings import long_freeze, long_warmup, more_than_data, slow_average, tell_settings
from shared.run.summary import ROOT, accuracy, command, verdict

RULES = (
    HealthRule("uniform", lambda line: line["entropy"] > 4, "entropy {entropy:.2f}: lower --teacher_temp"),
    HealthRule("flat", lambda line: line["loss"] > 2, "the loss is {loss:.1f}: raise --lr", first_step=10),
)


def test_each_failure_is_told_once_and_the_first_rule_decides():
    monitor = HealthMonitor(RULES)
    assert monitor.check({"step": 1, "entropy": 1.0, "loss": 1.0}) is None
    assert monitor.check({"step": 2, "entropy": 5.0, "loss": 3.0}) == "step 2: entropy 5.00: lower --teacher_temp"
    assert monitor.check({"step": 12, "entropy": 5.0, "loss": 3.0}) is None
    assert monitor.check({"step": 13, "entropy": 1.0, "loss": 3.0}) == "step 13: the loss is 3.0: raise --lr"
    assert list(monitor.warnings) == ["uniform", "flat"]


def test_the_spread_of_features_is_1_on_the_sphere_and_0_in_a_point():
    features = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(feature_spread(features), torch.tensor(1.0), rtol=0.03, atol=0)
    assert feature_spread(torch.ones(8, 16)) < 1e-6


def test_the_effective_rank_counts_directions():
    basis = torch.eye(8)[:3].repeat(5, 1)
    torch.testing.assert_close(rank_me(basis), torch.tensor(3.0), rtol=1e-3, atol=0)
    assert rank_me(torch.full((4, 8), torch.nan)).isnan()


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_a_warmup_of_more_than_a_third_of_the_run_is_named():
    assert long_warmup("--warmup", 10, 30) is None
    assert long_warmup("--warmup", 10, 20) == "--warmup 10 is a warm-up for 50% of the 20 epochs: take --warmup 2"
    assert long_warmup("--warmup_steps", 300, 500, "steps").endswith("60% of the 500 steps: take --warmup_steps 50")


def test_layers_that_are_frozen_for_more_than_a_tenth_of_the_run_are_named():
    assert long_freeze("--freeze", 30, 300) is None
    assert long_freeze("--freeze", 313, 300) == "--freeze 313 is more than a tenth of the 300 steps: take --freeze 30"


def test_an_average_that_keeps_more_than_half_of_its_first_weights_is_named():
    kept = 1.0
    for momentum in (0.9, 0.9, 0.8):
        kept *= momentum
    sentence = "--m 0.9: after 3 steps the teacher still keeps 65% of its initial weights: take --m 0.5"
    assert round(kept, 2) == 0.65 and slow_average("--m", np.array([0.9, 0.9, 0.8])) == sentence
    assert slow_average("--m", np.array([0.9, 0.9, 0.6])) is None
    assert slow_average("--m", np.full(300, 0.9999), "moving average").endswith(
        "97% of its initial weights: take --m 0.97"
    )


def test_more_outputs_than_images_are_named():
    assert more_than_data("--k", 240, 240) is None
    assert more_than_data("--k", 241, 240) == "--k 241 is more than the 240 images: take --k 24"
    assert more_than_data("--k", [3000, 20], 240) == "--k 3000 20 is more than the 240 images: take --k 24 24"
    assert more_than_data("--queue", 512, 240, take=64, what="chunks").endswith("240 chunks: take --queue 64")


@pytest.mark.parametrize("size", [1, 3, 10, 47, 300, 5000])
def test_the_value_to_take_is_no_longer_named(size):
    def advised(sentence):
        return float(sentence.split()[-1])

    assert long_warmup("-f", advised(long_warmup("-f", size, size)), size) is None
    assert long_freeze("-f", advised(long_freeze("-f", size, size)), size) is None
    momentum = advised(slow_average("-f", np.ones(size)))
    assert slow_average("-f", np.full(size, momentum)) is None
    assert slow_average("-f", cosine_schedule(momentum, 1.0, size, 1)) is None
    assert more_than_data("-f", int(advised(more_than_data("-f", size + 2, size + 1))), size + 1) is None


def test_only_what_there_is_to_say_is_printed(capsys):
    tell_settings(None, "one", None, "two")
    assert capsys.readouterr().out == "NOTE: one\nNOTE: two\n"


# --- Result -----------------------------------------------------------------------------------------------------------


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
    assert verdict(before, after, images, "--base_lr", "random weights").startswith(words)


def test_an_accuracy_is_told_with_that_before_and_what_follows():
    sentence = "k-NN on val: 30.0 % after 0 steps, 42.5 % after 30 steps (chance 33.3 %): learned"
    assert accuracy(LOG, "knn", "k-NN on val", 1000, 3) == [sentence]
    assert accuracy(LOG[2:], "knn", "k-NN on val", 1000, 3)[0].endswith(
        "42.5 % after 30 steps (chance 33.3 %): learned"
    )
    assert accuracy(LOG[:1], "knn", "k-NN on val", 1000, 3)[0].endswith("after 0 steps (chance 33.3 %)")
    assert accuracy(LOG, "top1", "top-1", 1000, 3) == []


def test_commands_can_be_pasted_where_the_run_was_started(monkeypatch, tmp_path):
    flags = {"arch": "vit", "image_size": None, "data_path": Path("/my images"), "size": [1, 2], "eval": True}
    expected = "--arch vit --data_path '/my images' --size 1 2 --eval"
    for folder, script in ((ROOT, "dino/eval_knn.py"), (ROOT / "dino", "eval_knn.py"), (tmp_path, None)):
        monkeypatch.chdir(folder)
        script = script or ROOT / "dino/eval_knn.py"
        assert command("dino/eval_knn.py", "IMAGES", **flags, full=False) == f"python {script} IMAGES {expected}"
