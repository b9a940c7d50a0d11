import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dino import vision_transformer
from dino.vision_transformer import (
    Block,
    DINOHead,
    DropPath,
    VisionTransformer,
    trunc_normal_,
)

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "qkv_bias": True}


def make_vit(**kwargs) -> VisionTransformer:
    """A small network whose biases, norms and positions are all far from their trivial initial values."""
    torch.manual_seed(0)
    model = VisionTransformer(**(SIZES | kwargs))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def gradients(model: nn.Module, output: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a weighted sum of ``output`` with respect to all parameters that it depends on."""
    model.zero_grad(set_to_none=True)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5 * scale + 1e-6, msg=name)


def test_a_seed_draws_weights_in_the_official_order():
    torch.manual_seed(5)
    model = VisionTransformer(**(SIZES | {"depth": 2}))
    torch.manual_seed(5)
    conv = nn.Conv2d(3, 48, 8, 8)
    for _ in range(2):  # torch's own initialisation of every layer comes first
        nn.Linear(48, 144), nn.Linear(48, 48), nn.Linear(48, 192), nn.Linear(192, 48)
    positions, cls = (trunc_normal_(torch.empty(1, n, 48), std=0.02) for n in (17, 1))
    qkv = trunc_normal_(torch.empty(144, 48), std=0.02)
    torch.testing.assert_close(model.patch_embed.proj.weight, conv.weight)
    torch.testing.assert_close(model.pos_embed.detach(), positions)
    torch.testing.assert_close(model.cls_token.detach(), cls)
    torch.testing.assert_close(model.blocks[0].attn.qkv.weight.detach(), qkv)
    assert not model.blocks[1].mlp.fc2.bias.any()


@pytest.mark.parametrize("training", [True, False])
def test_packed_resolutions_equal_separate_passes_in_values_and_gradients(training):
    model = make_vit().train(training)
    batches = [torch.randn(2, 3, 32, 32), torch.randn(5, 3, 16, 16), torch.randn(3, 3, 24, 40)]
    separate = torch.cat([model(batch) for batch in batches])
    expected = gradients(model, separate)
    packed = model(batches)
    assert packed.shape == (10, 48)
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, packed), expected)


def test_recomputing_activations_changes_no_gradient_and_repeats_no_matrix_product(monkeypatch):
    model = make_vit(drop_rate=0.3, attn_drop_rate=0.0, drop_path_rate=0.3).train()
    images = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16)]

    def step():
        torch.manual_seed(2)  # the same dropout
        with FlopCounterMode(display=False) as counter:
            grads = gradients(model, model(images))
        return grads, counter.get_total_flops()

    found, flops = step()
    monkeypatch.setattr(vision_transformer, "recompute", lambda function, x, draws=False: function(x))
    expected, expected_flops = step()
    assert_same_gradients(found, expected)
    assert flops == expected_flops > 0


def test_a_block_keeps_ten_widths_per_token():
    block = Block(64, num_heads=2)
    x = torch.randn(4, 50, 64, requires_grad=True)
    kept = {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t):
        block(x)
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    elements = sum(t.untyped_storage().nbytes() / 4 for pointer, t in kept.items() if pointer not in parameters)
    # input, queries with keys and values, attention's output, its residual sum, the MLP's hidden layer
    assert elements / (4 * 50 * 64) == pytest.approx(1 + 3 + 1 + 1 + 4, rel=0.02)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    layout = [(300, 5), (200, 3)]
    kept = drop(torch.ones(300 * 5 + 200 * 3, 4), layout)
    samples = [kept[:1500].view(300, -1), kept[1500:].view(200, -1)]
    for sample in torch.cat([s[:, :1] for s in samples]).unique():
        assert sample == 0 or sample == pytest.approx(1 / 0.75)
    assert all((s == s[:, :1]).all() for s in samples)
    assert abs(torch.cat([s[:, 0] for s in samples]).mean().item() - 1) < 0.08
    x = torch.randn(4, 5)
    assert drop.eval()(x) is x


def test_bfloat16_autocast_stays_close_and_leaves_float32_gradients():
    student = nn.Sequential(make_vit(), DINOHead(48, 40, hidden_dim=32, bottleneck_dim=16))
    images = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16)]
    exact = student(images)
    expected = gradients(student, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = student(images)
    torch.testing.assert_close(logits.float(), exact, rtol=0, atol=0.03)
    for name, gradient in gradients(student, logits.float()).items():
        assert gradient.dtype == torch.float32
        similarity = F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert similarity > 0.98 or expected[name].norm() < 1e-4, name


@pytest.mark.slow
def test_compiled_network_gives_the_same_loss_and_gradients():
    model = make_vit(depth=2).train()
    images = [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)]
    eager = model(images)
    expected = gradients(model, eager)
    model.compile()
    compiled = model(images)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    assert_same_gradients(gradients(model, compiled), expected)
