"""The network of ViT-22B and its files; arrays of the reference: tests/golden."""

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock

from shared.evaluation.extract_features import load_hub
from shared.networks.weights import WeightMismatch
from tests.vit22b.tiny import timm_state
from vit22b.hub import build, sizes
from vit22b.scaled_vit import Block, ScaledViT, Switches

SWITCHES = [
    Switches(),
    Switches(fused=False, norm="layernorm", qkv_bias=True),
    Switches(parallel=False, fused=False, norm="layernorm_nobias", out_bias=False),
    Switches(qk_norm=False, qkv_bias=True, mlp_bias=False, out_bias=False),
]


def noisy(module: torch.nn.Module) -> torch.nn.Module:
    """Values everywhere, also in biases and scales."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def small(switches: Switches | None = None, **options) -> ScaledViT:
    return noisy(
        ScaledViT(24, 2, 40, 3, **{"patch_size": 4, "img_size": 16, "num_classes": 5} | options, switches=switches)
    )


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("fuse_out", [True, False])
def test_the_block_is_that_of_timm(qk_norm, fuse_out):
    block = noisy(Block(24, 3, 48, Switches(qk_norm=qk_norm, norm="layernorm", gelu="none", qkv_bias=True)))
    theirs = ParallelScalingBlock(24, 3, 2.0, qkv_bias=True, qk_norm=qk_norm, fuse_out_proj=fuse_out)
    for module in (theirs.in_norm, theirs.q_norm, theirs.k_norm):
        module.eps = 1e-6
    theirs.load_state_dict(timm_state(block, fuse_out))
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(block(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_fused_products_change_nothing_but_the_speed():
    fused, unfused = (noisy(Block(24, 3, 40, Switches(fused=fused, qkv_bias=True))) for fused in (True, False))
    x = torch.randn(2, 7, 24)
    for block in (fused, unfused):
        block(x).sin().sum().backward()
    torch.testing.assert_close(fused(x), unfused(x), rtol=1e-5, atol=1e-5)
    for (name, parameter), other in zip(fused.named_parameters(), unfused.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_a_sequential_block_adds_one_after_the_other():
    block = noisy(Block(24, 3, 40, Switches(parallel=False, fused=False)))
    x = torch.randn(2, 7, 24)
    between = x + block.attention(block.norm(x))
    torch.testing.assert_close(block(x), between + block.mlp(block.mlp_norm(between)))
    with pytest.raises(ValueError, match="fused products need the parallel block"):
        Switches(parallel=False)


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("pool", ["map", "gap"])
def test_a_file_tells_how_its_network_was_built(switches, pool):
    network = noisy(build("vit_micro", 1, 32, patch_size=8, switches=switches, pool=pool))
    found = sizes("vit_micro", network.state_dict())
    assert found["img_size"] == 32 and found["patch_size"] == 8 and found["pool"] == pool
    again = build("vit_micro", 1, **found)
    again.load_state_dict(network.state_dict())
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(again(images), network(images), rtol=1e-5, atol=1e-5)


def test_files_of_another_layout_are_refused():
    for other in (timm.create_model("vit_tiny_patch16_224"), timm.create_model("resnet18")):
        with pytest.raises(WeightMismatch, match="vit_b: another layout, without the fused matrices"):
            sizes("vit_b", other.state_dict())
    tensors = small().state_dict()
    with pytest.raises(WeightMismatch, match="15 positions are no square grid"):
        sizes("vit_b", tensors | {"patches.positions": torch.zeros(1, 15, 24)})
    assert load_hub("vit22b").CARD.name == "vit22b"


def test_positions_follow_the_grid_of_other_images():
    network = small()
    positions = network.patches.positions.data
    torch.nn.init.zeros_(network.patches.weight)
    torch.nn.init.zeros_(network.patches.bias)
    torch.testing.assert_close(network.patches(torch.randn(1, 3, 16, 16)), positions)
    ramp = torch.arange(4.0)[:, None].expand(4, 4).reshape(1, 16, 1).expand(1, 16, 24)
    positions.copy_(ramp)
    found = network.patches(torch.randn(1, 3, 32, 8)).view(8, 2, 24)  # 16 patches of another grid
    assert (found.diff(dim=0) > 0).all() and found.diff(dim=1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 17}, "a patch of 17 pixels is larger than an image of 16"),
        ({"pool": "tok"}, "pool 'tok' is neither map nor gap"),
        ({"switches": Switches(norm="batch")}, "norm 'batch' is none of rmsnorm"),
    ],
)
def test_what_cannot_be_built_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
    with pytest.raises(ValueError, match="a patch of 4 pixels is larger than an image of 16x3"):
        small()(torch.zeros(1, 3, 16, 3))
    with pytest.raises(ValueError, match="a width of 25 cannot be split into 3 heads"):
        ScaledViT(25, 1, 40, 3)
    with pytest.raises(ValueError, match="vit_h is none of vit_micro"):
        build("vit_h")
