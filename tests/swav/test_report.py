"""Use of the prototypes, collapse diagnostics and the pictures of a run."""

import math
from types import SimpleNamespace

import pytest
import torch

from swav.main_deepclusterv2 import cluster_usage
from swav.report import DEEPCLUSTERV2_ADVICE, SWAV_ADVICE, PrototypeUsage, collapse_monitor, plots, usage_of
from tests.processes import run_processes

HEALTHY = {
    "step": 100,
    "loss": 5.0,
    "code_entropy": 3.0,
    "ln_k": math.log(3000),
    "assigned": 20000.0,
    "prototypes_used": 2900.0,
    "prototype_perplexity": 2500.0,
    "feature_spread": 0.9,
}


def monitor(first_step: int = 0, advice: dict = SWAV_ADVICE):
    return collapse_monitor(3000, 4 * first_step, steps_per_epoch=1000, advice=advice)


@pytest.mark.parametrize(
    ("signs", "words", "flag"),
    [
        ({"code_entropy": 8.0}, "the codes are uniform (entropy 8.000 of ln K = 8.006)", "--epsilon"),
        ({"prototype_perplexity": 20.0, "prototypes_used": 25.0}, "25 of 3000 got any of 20000", "--nmb_prototypes"),
        ({"feature_spread": 0.01}, "nearly the same embedding", "--base_lr"),
        ({"loss": math.log(3000)}, "still at ln K = 8.006", "--freeze_prototypes_niters"),
    ],
)
def test_every_kind_of_collapse_is_said_with_a_flag_to_try(signs, words, flag):
    health = monitor(first_step=50)
    sentence = health.check(HEALTHY | signs) or health.check(HEALTHY | signs)
    assert words in sentence and flag in sentence and sentence.startswith("step 100: ")


@pytest.mark.parametrize("advice", [SWAV_ADVICE, DEEPCLUSTERV2_ADVICE], ids=["swav", "deepclusterv2"])
def test_healthy_and_early_lines_say_nothing(advice):
    health = monitor(first_step=50, advice=advice)
    line = HEALTHY if advice is SWAV_ADVICE else {k: v for k, v in HEALTHY.items() if k != "code_entropy"}
    assert health.check(line) is None
    assert health.check(line | {"step": 49, "feature_spread": 0.0}) is None
    assert health.check(line | {"step": 50, "feature_spread": 0.0}) is not None


def test_a_loss_that_passes_ln_k_on_its_way_is_no_problem():
    health = monitor()
    for loss in (9.0, math.log(3000), 7.0, math.log(3000), math.nan, math.log(3000), 6.0):
        assert health.check(HEALTHY | {"loss": loss}) is None


def test_the_first_images_of_an_epoch_are_no_collapse():
    torch.manual_seed(0)
    for images in (10, 100, 1000, 10_000):
        counts = torch.bincount(torch.randint(3000, (images,)), minlength=3000)
        usage = {name: value.item() for name, value in usage_of(counts).items()}
        assert monitor().check(HEALTHY | usage) is None


def test_usage_of_some_prototypes():
    usage = usage_of(torch.tensor([4, 0, 4, 0, 0]))
    assert usage["assigned"] == 8 and usage["prototypes_used"] == 2
    torch.testing.assert_close(usage["prototype_perplexity"].item(), 2.0)
    assert usage_of(torch.zeros(5, dtype=torch.int64))["prototypes_used"] == 0


def test_the_likeliest_prototype_of_a_code_counts():
    usage = PrototypeUsage(3)
    usage.add(torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.6, 0.3], [0.9, 0.1, 0.0], [math.nan, 0.1, 0.2]]))
    assert usage.counts.tolist() == [1, 2, 0]
    assert usage.end_epoch() == {"prototypes_used": 2, "dead_prototypes": 1}
    assert usage.end_epoch() == {"prototypes_used": 0, "dead_prototypes": 3}


def count_on(rank: int) -> dict:
    usage = PrototypeUsage(3)
    usage.add(torch.eye(3)[[rank, 2]])
    state = usage.state_dict()
    again = PrototypeUsage(3)
    again.load_state_dict(state)
    return {"state": state, "before": usage.summary(), "after": again.summary()}


def test_processes_count_together_and_go_on_from_a_checkpoint():
    for found in run_processes(count_on, 2):
        assert found["state"]["counts"].tolist() == [1, 1, 2]
        assert found["before"] == found["after"] and found["after"]["assigned"] == 4


def test_the_head_that_uses_its_clusters_least_evenly_is_reported():
    assignments = torch.tensor([[0, 1, 2, -100], [1, 1, 1, -100]])
    heads = [SimpleNamespace(weight=torch.zeros(k, 2)) for k in (3, 4)]
    usage = cluster_usage(assignments, heads)
    assert usage == {"assigned": 3, "prototypes_used": 1, "prototype_perplexity": 1.0, "dead_prototypes": 3}


def test_curves_show_codes_where_there_are_codes():
    assert list(plots(has_codes=True)[0].series) == ["loss", "code_entropy"]
    assert list(plots(has_codes=False)[0].series) == ["loss"]
