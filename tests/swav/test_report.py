"""Use of the prototypes, collapse diagnostics and the pictures of a run."""

import math
from types import SimpleNamespace

import torch

from shared.run.health import usage_of
from swav.losses import PrototypeUsage
from swav.main_deepclusterv2 import cluster_usage
from tests.processes import run_processes


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
