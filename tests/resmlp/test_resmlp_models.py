"""The network: the paper's table, timm's network, official layouts, other image sizes."""

import pytest
import timm
import torch
from timm.models import mlp_mixer
from torch.utils.flop_counter import FlopCounterMode

from resmlp.resmlp_models import ARCHITECTURES, CrossPatchLinear, ResMLP, resize_cross_patch_layers

# Parameters of table 1 (S36's row in the README is that of B24/16), official LayerScale, entries of the state dict
TABLE = {
    "resmlp_12": ({}, 15_350_872, 0.1, 150),
    "resmlp_24": ({}, 30_020_680, 1e-5, 294),
    "resmlp_36": ({}, 44_690_488, 1e-6, 438),
    "resmlpB_24": ({}, 129_138_280, 1e-6, 294),
    "resmlpB_24/16": ({"patch_size": 16}, 115_736_776, 1e-6, 294),
}


def randomize(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights of which none is neutral: at the start alpha is 1, beta 0, and LayerScale hides the branches."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1 + 0.05
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("name", TABLE)
def test_networks_are_those_of_the_papers_table(name):
    options, parameters, layer_scale, entries = TABLE[name]
    with torch.device("meta"):
        network = ARCHITECTURES[name.split("/")[0]](**options)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == entries
    small = ARCHITECTURES[name.split("/")[0]](**options, img_size=32, embed_dim=4)
    assert all((gamma == layer_scale).all() for b in small.blocks for gamma in (b.gamma_1, b.gamma_2))


@pytest.mark.parametrize(("name", "gflop"), [("resmlp_12", 3.0), ("resmlpB_24", 100.2)])
def test_multiply_adds_are_those_of_the_papers_table(name, gflop):
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        ARCHITECTURES[name]()(torch.empty(1, 3, 224, 224))
    assert round(counter.get_total_flops() / 2e9, 1) == gflop  # the paper counts a multiply-add as one


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resmlp_12", {"img_size": 64, "embed_dim": 32, "num_classes": 10}),
        ("resmlp_24", {"img_size": 48, "embed_dim": 16, "num_classes": 0}),
        ("resmlp_36", {"img_size": 32, "embed_dim": 8, "num_classes": 3, "in_chans": 1}),
        ("resmlpB_24", {"img_size": 32, "embed_dim": 16, "num_classes": 5}),
        ("resmlp_12", {"img_size": 32}),
    ],
)
def test_timms_network_gives_the_same_output_with_the_same_weights(name, options):
    ours = ARCHITECTURES[name](**options).eval().requires_grad_(False)
    if "embed_dim" in options:  # timm's factories fix the width
        randomize(ours)
        shape = {"patch_size": ours.patch_size, "num_blocks": len(ours.blocks), "mlp_ratio": 4}
        theirs = mlp_mixer.MlpMixer(**shape, block_layer=mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine, **options)
    else:
        theirs = timm.create_model(f"{name}_224", **options)
    theirs.load_state_dict(mlp_mixer.checkpoint_filter_fn(ours.state_dict(), theirs), strict=True)
    images = torch.randn(2, options.get("in_chans", 3), ours.img_size, ours.img_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.eval()(images), rtol=1e-4, atol=1e-4)


def test_images_of_another_size_and_patches_that_do_not_fill_one_are_refused():
    network = ResMLP(img_size=32, patch_size=16, embed_dim=8, depth=1)
    with pytest.raises(ValueError, match=r"32x48 pixels do not fit a network for 32x32.*exactly 4 patches"):
        network(torch.zeros(1, 3, 32, 48))
    with pytest.raises(ValueError, match="patches of 16 pixels do not fill an image of 40 pixels"):
        ResMLP(img_size=40, patch_size=16)


def centres(grid: int) -> list[torch.Tensor]:
    """Rows and columns of the patches' centres in [0, 1], each (grid, grid)."""
    return list(torch.meshgrid(*[(torch.arange(grid) + 0.5) / grid] * 2, indexing="ij"))


def test_a_network_is_resized_to_another_grid():
    small = randomize(ResMLP(img_size=16, patch_size=4, embed_dim=8, depth=2, num_classes=3))
    unchanged = resize_cross_patch_layers(small.state_dict(), 4)
    assert all(torch.equal(unchanged[name], value) for name, value in small.state_dict().items())

    # what a layer does to smooth images does not depend on the grid: here it blurs, and mixes in the mean
    layer, large = CrossPatchLinear(16**2), CrossPatchLinear(24**2)
    places = torch.stack(centres(16), -1).flatten(0, 1)
    kernel = torch.exp(-torch.cdist(places, places).square() / 0.05)
    layer.weight.data = kernel / kernel.sum(dim=1, keepdim=True) + 1 / 16**2
    layer.bias.data = places.sum(dim=1)
    state = resize_cross_patch_layers({"blocks.0.attn.weight": layer.weight, "blocks.0.attn.bias": layer.bias}, 24)
    large.weight.data, large.bias.data = state["blocks.0.attn.weight"], state["blocks.0.attn.bias"]

    def smooth(grid: int) -> torch.Tensor:
        y, x = centres(grid)
        return (torch.sin(3 * y) + torch.cos(2 * x + y)).reshape(1, grid**2, 1)

    out = torch.nn.functional.interpolate(
        layer(smooth(16)).reshape(1, 1, 16, 16), size=(24, 24), mode="bicubic", align_corners=False
    )
    inside = slice(2, -2)
    found = large(smooth(24)).reshape(24, 24)
    torch.testing.assert_close(found[inside, inside], out[0, 0, inside, inside], rtol=0.02, atol=0.02)


def test_every_linear_layer_starts_small_and_without_a_bias():
    network = ResMLP(img_size=32, patch_size=4, embed_dim=32, depth=2, num_classes=7)
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert 0.015 < module.weight.std() < 0.025, name
            assert (module.bias == 0).all(), name
    assert network.patch_embed.proj.bias.abs().sum() > 0  # the convolution keeps torch's initialisation


def test_stochastic_depth_is_the_same_for_every_block_and_keeps_the_mean():
    network = ResMLP(img_size=8, patch_size=4, embed_dim=8, depth=3, drop_path_rate=0.3)
    assert [block.drop_path.drop_prob for block in network.blocks] == [0.3] * 3
    torch.manual_seed(0)
    kept = network.blocks[0].drop_path.train()(torch.ones(20_000, 1, 1)).flatten()
    torch.testing.assert_close(kept.unique(), torch.tensor([0, 1 / 0.7]))
    assert abs(kept.mean() - 1) < 0.02
