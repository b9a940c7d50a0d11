"""What losses and groups promise beyond the values of ``tests/golden/test_paws.py``."""

import torch

from paws.encoder import build_encoder
from paws.losses import paws_loss, sharpen, support_labels
from paws.optimisation import parameter_groups

K, S, V, D = 4, 3, 2, 8  # classes, supports of each, views, dimensions


def test_targets_get_no_gradient_and_a_prediction_of_zero_gives_no_nan():
    generator = torch.Generator().manual_seed(0)
    rows = {"anchors": 12, "anchor_supports": V * S * K, "targets": 6, "target_supports": V * S * K}
    inputs = {name: torch.randn(n, D, generator=generator).requires_grad_() for name, n in rows.items()}
    labels = support_labels(S, K, views=V)
    ploss, rloss, _ = paws_loss(**inputs, labels=labels, temperature=0.001)  # most votes underflow
    (ploss + rloss).backward()
    assert inputs["targets"].grad is None and inputs["target_supports"].grad is None
    assert inputs["anchors"].grad.isfinite().all() and inputs["anchor_supports"].grad.isfinite().all()


# --- Groups of parameters ---------------------------------------------------------------------------------------------


def test_a_low_temperature_gives_the_most_likely_class_and_finite_gradients():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.4, 0.4]], requires_grad=True)
    sharpened = sharpen(probabilities, 0.001)
    torch.testing.assert_close(sharpened, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]))
    sharpened[:, 0].sum().backward()
    assert probabilities.grad.isfinite().all()


def test_biases_and_batch_norms_are_excluded_but_for_that_of_a_shortcut():
    with torch.device("meta"):
        encoder = build_encoder("resnet50", 16, use_pred_head=True)
    adapted, excluded = parameter_groups(encoder, 1e-6)
    names = {id(p): name for name, p in encoder.named_parameters()}
    vectors = {names[id(p)] for p in adapted["params"] if p.ndim == 1}
    assert vectors == {f"layer{i}.0.downsample.1.weight" for i in range(1, 5)}  # its name has no "bn"
    assert all(p.ndim == 1 for p in excluded["params"]) and excluded["weight_decay"] == 0
    assert len(adapted["params"]) + len(excluded["params"]) == len(names)


def test_in_networks_of_libraries_all_vectors_are_excluded():
    adapted, _ = parameter_groups(build_encoder("test_resnet", 16), 1e-6)
    assert all(p.ndim > 1 for p in adapted["params"])
