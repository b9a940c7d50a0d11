import pytest
import torch
from torch import nn

from shared.run.attempt import NotFinite
from shared.run.not_finite import FiniteGuard, NonFiniteSearch

CPU = torch.device("cpu")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2)))


def count(guard, *skipped):
    for step in skipped:
        guard.count(torch.tensor(float(step)))


def test_only_steps_in_a_row_count():
    guard = FiniteGuard({}, max_skipped_steps=3, device=CPU)
    count(guard, 1, 1, 0, 1, 1)
    assert not guard.too_many() and not guard.is_good()
    count(guard, 1)
    assert guard.too_many()
    count(guard, 0)
    assert not guard.too_many() and guard.is_good()


def test_a_limit_of_zero_never_ends_the_run():
    guard = FiniteGuard({}, max_skipped_steps=0, device=CPU)
    count(guard, *[1] * 50)
    assert not guard.too_many()


def test_steps_before_a_checkpoint_still_count_after_it():
    guard = FiniteGuard({}, max_skipped_steps=3, device=CPU, in_a_row=2)
    count(guard, 1)
    assert guard.too_many()


def test_running_statistics_fall_back_to_the_last_finite_ones(tmp_path):
    net, untouched = network(), network()
    guard = FiniteGuard({"net": net}, 3, CPU)
    good, bad = torch.randn(16, 4), torch.full((16, 4), torch.nan)
    for batch, skipped in ((good, 0), (bad, 1), (bad, 1), (good + 1, 0)):
        net(batch)
        guard.count(torch.tensor(float(skipped)))
    for batch in (good, good + 1):
        untouched(batch)
    torch.testing.assert_close(net[1].running_mean, untouched[1].running_mean, rtol=0, atol=0)
    torch.testing.assert_close(net[1].running_var, untouched[1].running_var, rtol=0, atol=0)


def break_views(net, views):
    views[1, 2] = torch.inf


def break_a_layer(net, views):
    with torch.no_grad():
        net[2][1].bias[0] = torch.nan


def break_the_loss(net, views):
    return torch.tensor(torch.nan)


def break_gradients(net, views):
    net[0].weight.grad[0, 0] = net[1].weight.grad[0] = torch.inf


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (break_views, "the input of net"),
        (break_a_layer, "net.2.1"),
        (break_the_loss, "the loss"),
        (break_gradients, "the gradient of net.1.weight"),  # the backward pass meets it before net.0.weight
        (lambda net, views: None, "nothing when the step is repeated"),
    ],
)
def test_the_first_bad_tensor_is_named_and_saved_with_the_batch(fault, name, tmp_path):
    net, views = network(), torch.randn(6, 4)
    net(views).sum().backward()
    loss = fault(net, views)
    search = NonFiniteSearch({"net": net}, tmp_path / "nonfinite.pth")
    with pytest.raises(NotFinite, match="2 steps in a row, up to step 42") as stop:
        with search.of({"step": 41, "epoch": 3}, (views, torch.arange(6))):
            net(views)
            search.see_loss(torch.tensor(1.0) if loss is None else loss)
            search.stop(in_a_row=2)
    assert name in str(stop.value)
    saved = torch.load(tmp_path / "nonfinite.pth", weights_only=True)
    assert (saved["first_not_finite"], saved["step"], saved["epoch"], saved["rank"]) == (name, 41, 3, 0)
    torch.testing.assert_close(saved["batch"][0], views, equal_nan=True)
    assert saved["batch"][1].tolist() == list(range(6))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_batch_of_names_is_saved_under_them(tmp_path):
    search = NonFiniteSearch({}, tmp_path / "nonfinite.pth")
    with pytest.raises(NotFinite), search.of({"step": 1, "epoch": 0}, {"tokens": torch.arange(3)}):
        search.stop(in_a_row=1)
    assert torch.load(tmp_path / "nonfinite.pth", weights_only=True)["tokens"].tolist() == [0, 1, 2]


def test_a_batch_that_cannot_be_saved_does_not_hide_why_the_run_ends(tmp_path):
    search = NonFiniteSearch({"net": (net := network())}, tmp_path / "gone" / "nonfinite.pth")
    with pytest.raises(NotFinite, match=r"the first such tensor is the input of net .* could not be saved to .*gone"):
        with search.of({"step": 41, "epoch": 0}, None):
            net(torch.full((6, 4), torch.nan))
            search.stop(in_a_row=2)
