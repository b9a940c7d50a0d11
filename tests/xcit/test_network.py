"""XCiT's network: equal to timm's, the paper's table, any image size, gradients, parts from their formulas."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from xcit import cross_covariance_transformer
from xcit.cross_covariance_transformer import (
    ARCHITECTURES,
    XCA,
    XCiT,
    architecture,
    build_xcit,
)

PARAMETERS = {  # of the released files, with 1000 classes, patches of 16 and of 8
    "nano_12": (3_053_224, 3_049_016),
    "tiny_12": (6_716_272, 6_706_504),
    "tiny_24": (12_116_896, 12_107_128),
    "small_12": (26_253_304, 26_213_032),
    "small_24": (47_671_384, 47_631_112),
    "medium_24": (84_395_752, 84_323_624),
    "large_24": (189_096_136, 188_932_648),
}


def randomized(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor non-trivial, so that a forgotten term shows up."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                noise = torch.empty_like(value).uniform_(-1, 1, generator=generator)
                if name.endswith(("running_var", "gamma1", "gamma2", "gamma3", "temperature", "norm1.weight")):
                    value.copy_(1 + 0.3 * noise)
                else:
                    value.add_(0.1 * noise)
    return network


def tiny(**options) -> XCiT:
    torch.manual_seed(0)
    options = dict(patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5) | options
    return randomized(XCiT(**options))


@pytest.mark.parametrize("patch_size", [16, 8])
def test_parameters_and_flops_are_those_of_the_readme(patch_size):
    entries = {"12": (383, 377), "24": (707, 701)}
    for size, parameters in PARAMETERS.items():
        with torch.device("meta"):
            network = build_xcit(f"xcit_{size}_p{patch_size}")
        assert sum(p.numel() for p in network.parameters()) == parameters[patch_size == 8]
        assert len(network.state_dict()) == entries[size[-2:]][patch_size == 8]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        build_xcit(f"xcit_nano_12_p{patch_size}").eval()(torch.empty(1, 3, 224, 224))
    # multiply-adds; the counter leaves out norms and activations, the table rounds to one digit
    assert counter.get_total_flops() / 2e9 == pytest.approx({16: 0.55, 8: 2.1}[patch_size], abs=0.06)


def test_every_published_network_has_a_function_of_its_name():
    assert len(ARCHITECTURES) == 14
    for name in ARCHITECTURES:
        assert getattr(cross_covariance_transformer, name).args == (name,)
        options = architecture(name)
        assert name.endswith(f"_p{options['patch_size']}") and f"_{options['depth']}_" in name


@torch.no_grad()
def test_cross_covariance_attention_stays_in_the_range_of_float16():
    torch.manual_seed(0)
    attention = XCA(16, num_heads=2)
    attention.qkv.weight.mul_(20)
    x = torch.randn(1, 4096, 16)
    q, k, _ = attention.qkv(x)[0].split(16, dim=1)
    assert (q.T @ k).abs().max() > torch.finfo(torch.float16).max  # a sum over tokens that it cannot hold
    expected = attention(x)
    difference = attention.half()(x.half()).float() - expected
    assert difference.abs().max() < 0.01 * expected.abs().max()


def test_attention_of_the_class_token_is_what_its_output_is_made_of():
    network = tiny().eval()
    images = torch.randn(2, 3, 24, 40)
    attention = network.class_attention(images)
    assert attention.shape == (2, 2, 3, 5)
    layer = network.cls_attn_blocks[0].attn
    x = torch.randn(2, 6, 32)
    weights = layer.attention(x)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 2))
    values = x @ layer.qkv.weight[64:].T + layer.qkv.bias[64:]
    expected = torch.einsum("bhn,bnhd->bhd", weights, values.unflatten(2, (2, 16))).flatten(1)
    torch.testing.assert_close(layer(x)[:, 0], layer.proj(expected))


def test_networks_without_normalised_tokens_can_be_trained():
    network = tiny(tokens_norm=False).train()  # the published code fails in this backward pass on a current torch
    network(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_constructor_options():
    network = tiny(num_classes=0, in_chans=1, use_pos=False, qkv_bias=False, img_size=16)
    assert network(torch.randn(2, 1, 16, 16)).shape == (2, 32)
    network.reset_classifier(3)
    assert network(torch.randn(2, 1, 16, 16)).shape == (2, 3) and network.get_classifier() is network.head
    with pytest.raises(ValueError, match="patch_size 32"):
        tiny(patch_size=32)
    with pytest.raises(ValueError, match="drop_path_rate 1"):
        tiny(drop_path_rate=1)
    with pytest.raises(ValueError, match="xcit_huge_p16 is none of"):
        build_xcit("xcit_huge_p16")


def test_initial_weights():
    torch.manual_seed(0)
    network = build_xcit("xcit_tiny_12_p16")
    assert network.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert all(not module.bias.any() for module in network.modules() if isinstance(module, nn.Linear))
    assert (network.blocks[3].gamma2 == 1).all()
    bound = 1 / math.sqrt(64)  # convolutions keep torch's own
    assert network.pos_embeder.token_projection.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    with torch.device("meta"):
        assert "cls_token" in network.no_weight_decay()
