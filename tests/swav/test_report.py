"""Use of the prototypes, collapse diagnostics and the pictures of a run."""

import math
from types import SimpleNamespace

import torch

from shared.run.health import HealthMonitor, usage_of
from swav.losses import PrototypeUsage
from swav.main_deepclusterv2 import cluster_usage
from swav.report import health_rules
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


def monitor() -> HealthMonitor:
    return HealthMonitor(health_rules("SwAV", 3000, epochs=0, steps_per_epoch=1000))


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
