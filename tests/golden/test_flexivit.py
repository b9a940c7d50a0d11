"""Resizes, network, sampler and losses of FlexiViT against arrays measured on the reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flexivit.checkpoints import from_npz
from flexivit.flexible_vit import (
    FlexiViT,
    PatchKernel,
    pi_resize,
    resize_matrix,
    resize_positions,
    sincos_positions,
    zoom_positions,
)
from flexivit.losses import distance, sigmoid_cross_entropy, softmax_cross_entropy
from flexivit.main import draw_grid, learning_rate_factor
from tests.golden.golden_file import GoldenFile

GOLDEN = GoldenFile("flexivit")


def assert_close(found: torch.Tensor, key: str, error: float = 1e-5) -> None:
    """Up to ``error`` times the largest value."""
    expected = GOLDEN.tensor(key)
    torch.testing.assert_close(found, expected, rtol=0, atol=error * float(expected.abs().max()))


def kernel(key: str) -> torch.Tensor:
    """(height, width, C, D) as (D, C, height, width)."""
    return GOLDEN.tensor(key).permute(3, 2, 0, 1)


def images(key: str) -> torch.Tensor:
    return GOLDEN.tensor(key).permute(0, 3, 1, 2)


@pytest.mark.parametrize("case", GOLDEN.cases("pi_resize/"))
def test_patch_embeddings_are_resized_by_the_pseudo_inverse(case):
    config = GOLDEN.json(f"pi_resize/{case}/config")
    found = pi_resize(kernel(f"pi_resize/{case}/in/kernel_hwio"), tuple(config["new_hw"]))
    assert_close(found.permute(2, 3, 1, 0), f"pi_resize/{case}/out/kernel_hwio", 2e-5)


@pytest.mark.parametrize("case", GOLDEN.cases("resize_matrix/"))
def test_the_resize_of_a_patch_as_a_matrix(case):
    config = GOLDEN.json(f"resize_matrix/{case}/config")
    found = resize_matrix(tuple(config["old_hw"]), tuple(config["new_hw"]))
    assert_close(found.float(), f"resize_matrix/{case}/out/matrix", 1e-6)


@pytest.mark.parametrize("case", GOLDEN.cases("pi_equivalence/"))
def test_larger_patches_keep_their_tokens(case):
    where = f"pi_equivalence/{case}"
    new = tuple(GOLDEN.json(f"{where}/config")["new_hw"])
    patches, old_kernel = images(f"{where}/in/patches"), kernel(f"{where}/in/kernel_hwio")
    resized = F.interpolate(patches, size=new, mode="bilinear")
    assert_close(resized.permute(0, 2, 3, 1), f"{where}/out/patches_resized")
    assert_close(F.conv2d(patches, old_kernel).flatten(1), f"{where}/out/tokens_old")
    tokens = F.conv2d(resized, pi_resize(old_kernel, new)).flatten(1)
    assert_close(tokens, f"{where}/out/tokens_new")
    assert_close(tokens, f"{where}/out/tokens_old")


@pytest.mark.parametrize("case", GOLDEN.cases("patchify/"))
def test_patches_of_several_grids(case):
    where = f"patchify/{case}"
    config = GOLDEN.json(f"{where}/config")
    network = FlexiViT(config["width"], 0, 1, tuple(config["patch_size"]))
    network.patch_embed = PatchKernel(3, config["width"], tuple(config["patch_size"]))
    state = {"weight": kernel(f"{where}/params/kernel"), "bias": GOLDEN.tensor(f"{where}/params/bias")}
    network.patch_embed.proj.load_state_dict(state)
    batch = images(f"{where}/in/image")
    assert tuple(batch.shape[-2:]) == tuple(config["image_hw"])
    for grid in config["seqhw"]:
        tokens, found = network.embed(batch, network.patches_for(batch.shape[-2:], grid=grid))
        assert_close(tokens.unflatten(1, found), f"{where}/out/seqhw{grid}")


@pytest.mark.parametrize("case", GOLDEN.cases("posemb_model/"))
def test_positions_are_resized_at_the_call(case):
    where = f"posemb_model/{case}"
    config, table = GOLDEN.json(f"{where}/config"), GOLDEN.tensor(f"{where}/in/posemb")
    for rows, columns in config["new_grids"]:
        found = resize_positions(table.flatten(1, 2), tuple(config["old_grid"]), (rows, columns))
        assert_close(found.unflatten(1, (rows, columns)), f"{where}/out/{rows}x{columns}", 1e-6)


@pytest.mark.parametrize("case", GOLDEN.cases("posemb_load/"))
def test_positions_are_zoomed_for_a_network_that_starts_from_another(case):
    where = f"posemb_load/{case}"
    config, table = GOLDEN.json(f"{where}/config"), GOLDEN.tensor(f"{where}/in/posemb")
    for side in config["new_sides"]:
        found = zoom_positions(table, tuple(config["old_grid"]), (side, side))
        assert_close(found, f"{where}/out/{side}", 2e-6)


@pytest.mark.parametrize("case", GOLDEN.cases("posemb_sincos/"))
def test_fixed_positions(case):
    config = GOLDEN.json(f"posemb_sincos/{case}/config")
    found = sincos_positions((config["h"], config["w"]), config["width"], config["temperature"])
    assert_close(found, f"posemb_sincos/{case}/out/posemb", 1e-6)


@pytest.mark.parametrize("case", GOLDEN.cases("model/"))
def test_network_and_gradients_of_the_underlying_parameters(case):
    where = f"model/{case}"
    config = GOLDEN.json(f"{where}/config")
    network = FlexiViT(
        config["width"],
        config["depth"],
        config["num_heads"],
        tuple(config["patch_size"]),
        tuple(config["posemb_size"]),
        config["num_classes"],
        config["mlp_dim"],
        config["posemb"],
        config["pool_type"],
    )
    prefix = f"{where}/params/"
    network.load_state_dict(from_npz({key[len(prefix) :]: GOLDEN[key] for key in GOLDEN.keys(prefix)}), strict=True)
    batch = images(f"{where}/in/image")
    for grid in config["seqhw"]:
        assert_close(network.represent(batch, grid=grid), f"{where}/out/seqhw{grid}/pre_logits", 2e-5)
        logits = network(batch, grid=grid)
        assert_close(logits, f"{where}/out/seqhw{grid}/logits", 2e-5)
        if f"{where}/out/seqhw{grid}/encoded" in GOLDEN:
            assert_close(network.encode(batch, grid=grid), f"{where}/out/seqhw{grid}/encoded", 2e-5)
    logits.square().mean().backward()
    gradient = network.patch_embed.proj.weight.grad.permute(2, 3, 1, 0)
    assert_close(gradient, f"{where}/out/grad_seqhw{grid}/embedding/kernel", 2e-5)
    if config["posemb"] == "learn":
        found = network.pos_embed.grad
        assert_close(found, f"{where}/out/grad_seqhw{grid}/pos_embedding", 2e-5)


@pytest.mark.parametrize("case", GOLDEN.cases("sampler/"))
def test_the_grid_of_a_step(case):
    config = GOLDEN.json(f"sampler/{case}/config")
    steps, expected = GOLDEN[f"sampler/{case}/in/steps"], GOLDEN[f"sampler/{case}/out/choice"]
    ids = (config["xid"], config["wid"])
    found = [draw_grid(int(step), config["values"], config["weights"], ids) for step in steps]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", GOLDEN.cases("distance/"))
def test_losses(case):
    where = f"distance/{case}"
    student, teacher, multi_hot = (GOLDEN.tensor(f"{where}/in/{name}") for name in ("student", "teacher", "multi_hot"))
    for i, options in enumerate(GOLDEN.json(f"{where}/config")["kinds"]):
        assert_close(distance(student, teacher, **options), f"{where}/out/{i}", 2e-6)
    assert_close(sigmoid_cross_entropy(student, multi_hot), f"{where}/out/sigmoid_xent", 2e-6)
    found = softmax_cross_entropy(student, teacher.softmax(dim=1))
    assert_close(found, f"{where}/out/softmax_xent_teacher_probs", 2e-6)


@pytest.mark.parametrize("case", GOLDEN.cases("sched/"))
def test_learning_rate(case):
    config = GOLDEN.json(f"sched/{case}/config")
    assert config["decay_type"] == "cosine"
    steps, total, warmup = GOLDEN[f"sched/{case}/in/steps"], config["total_steps"], config["warmup_steps"]
    found = [config["base"] * learning_rate_factor(int(step), total, warmup) for step in steps]
    np.testing.assert_allclose(found, GOLDEN[f"sched/{case}/out/lr"], rtol=1e-6, atol=1e-7 * config["base"])


def test_every_array_was_compared():
    assert not GOLDEN.unread()
