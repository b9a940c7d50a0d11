import torch

from shared.run.health import HealthMonitor, HealthRule, feature_spread, rank_me

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


def test_a_rule_waits_for_its_first_step():
    monitor = HealthMonitor(RULES)
    assert monitor.check({"step": 9, "entropy": 1.0, "loss": 3.0}) is None
    assert monitor.check({"step": 10, "entropy": 1.0, "loss": 3.0}) is not None


def test_values_that_are_not_finite_hold_no_condition():
    assert HealthMonitor(RULES).check({"step": 20, "entropy": float("nan"), "loss": float("nan")}) is None


def test_the_spread_of_features_is_1_on_the_sphere_and_0_in_a_point():
    features = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(feature_spread(features), torch.tensor(1.0), rtol=0.03, atol=0)
    assert feature_spread(torch.ones(8, 16)) < 1e-6


def test_the_effective_rank_counts_directions():
    basis = torch.eye(8)[:3].repeat(5, 1)
    torch.testing.assert_close(rank_me(basis), torch.tensor(3.0), rtol=1e-3, atol=0)
    assert rank_me(torch.full((4, 8), torch.nan)).isnan()
