"""The network of NaViT, its packing and its draws; arrays of the reference: tests/golden."""

import importlib.util
import itertools
import math
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from navit.eval_resolutions import giga_operations
from navit.hub import build, load_navit, sizes
from navit.losses import contrastive_loss
from navit.main import loss_of_pairs
from navit.native_resolution_vit import (
    CHOICES,
    NaViT,
    Packed,
    Positions,
    checkpoint_filter_fn,
    coordinates_of,
    heads_first,
    patchify,
)
from navit.pack import choose_grid, first_fit
from navit.sampling import Dropping, Resolutions, nearest_grid
from shared.networks.weights import WeightMismatch
from tests.pretended_gpu.device import pretended_gpu
from tests.processes import run_processes

NEEDS_VARLEN = pytest.mark.skipif(
    importlib.util.find_spec("torch.nn.attention.varlen") is None, reason="this torch has no such function"
)


def small(**options) -> NaViT:
    torch.manual_seed(0)
    network = NaViT(32, 2, 2, **{"patch_size": 4, "num_classes": 5, "max_side": 12} | options)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval().requires_grad_(False)


NETWORKS = {
    "default": small(),
    "fourier": small(positions="fourier", coordinates="aspect", norm="rmsnorm"),
    "product": small(positions="product", coordinates="fractional", pool="gap", qk_norm=False),
    "table": small(positions="table", max_side=3, bias=True),
}
GRIDS = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(GRIDS, st.integers(0, 60), st.randoms(), st.sampled_from(sorted(NETWORKS)), st.floats(0.0, 0.8), st.booleans())
def test_any_packing_and_any_padding_give_the_logits_of_each_image_alone(grids, room, random, name, rate, scattered):
    network, dropping = NETWORKS[name], Dropping("constant", rate)
    rng = np.random.default_rng(random.randrange(1 << 30))
    images = [torch.from_numpy(rng.standard_normal((3, 4 * r, 4 * c), dtype=np.float32)) for r, c in grids]
    kept = [torch.from_numpy(dropping.draw(r * c, 0, rng)) for r, c in grids]
    parts = [(patchify(image, 4)[k], coordinates_of(*g)[k]) for image, k, g in zip(images, kept, grids, strict=True)]
    alone = torch.cat([network(Packed.of([p], [c], [g])) for (p, c), g in zip(parts, grids, strict=True)])

    order = random.sample(range(len(grids)), len(grids))
    places = first_fit([len(kept[i]) for i in order], max(map(len, kept)) + room)
    slots = torch.from_numpy(places.slots)
    if scattered:  # padding may lie anywhere
        slots, places = 2 * slots + 1, places._replace(shape=(places.shape[0], 2 * places.shape[1]))
    moved = [parts[i] for i in order]
    packed = Packed.of([p for p, _ in moved], [c for _, c in moved], [grids[i] for i in order], slots, places.shape)
    for kind in ("segments", "mask"):
        network.attention = kind
        torch.testing.assert_close(network(packed), alone[order], rtol=1e-5, atol=1e-5)


def test_packed_images_have_the_gradients_of_each_image_alone():
    images = [torch.randn(3, 8, 12), torch.randn(3, 4, 4), torch.randn(3, 16, 8)]
    found = {}
    for kind in ("segments", "mask"):
        network = small().requires_grad_(True)
        network.attention = kind
        network(images).square().sum().backward()
        found[kind] = [p.grad for p in network.parameters()]
    network = small().requires_grad_(True)
    for image in images:
        network([image]).square().sum().backward()
    for expected, *others in zip((p.grad for p in network.parameters()), *found.values(), strict=True):
        for gradient in others:
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@NEEDS_VARLEN
def test_flash_attention_gets_the_images_as_cumulative_lengths(monkeypatch):
    """torch's function needs a GPU: here another one takes its arguments."""

    def varlen(q, k, v, ends_q, ends_k, longest_q, longest_k):
        assert ends_q.dtype == ends_k.dtype == torch.int32 and longest_q == longest_k == 8
        parts = zip(*(t.tensor_split(ends_q[1:-1].long()) for t in (q, k, v)), strict=True)
        return torch.cat([heads_first(*(t[None] for t in part))[0] for part in parts])

    monkeypatch.setattr(importlib.import_module("torch.nn.attention.varlen"), "varlen_attn", varlen)
    network, images = small(), [torch.randn(3, 8, 12), torch.randn(3, 4, 4), torch.randn(3, 16, 8)]
    expected, network.attention = network(images), "varlen"
    torch.testing.assert_close(network(images), expected)


@NEEDS_VARLEN
@pytest.mark.parametrize(("capability", "has_it"), [((9, 0), True), ((7, 5), False)])
def test_a_gpu_without_flash_attention_takes_a_mask(capability, has_it, monkeypatch):
    """A T4, of compute capability 7.5, or a V100: training in half precision ended there with torch's error."""
    network, images = small(), [torch.randn(3, 8, 12), torch.randn(3, 4, 4)]
    expected = network(images)
    with pretended_gpu(), monkeypatch.context() as patch, torch.autocast("cuda", torch.float16):
        used, varlen = [], sys.modules["torch.nn.attention.varlen"]
        attend = varlen.varlen_attn
        patch.setattr(varlen, "varlen_attn", lambda *args: used.append(0) or attend(*args))
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        found = network.cuda()([image.cuda() for image in images]).float().cpu()
    assert bool(used) == has_it
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_logits_of_a_cpu():
    network, images = small(), [torch.randn(3, 8, 12), torch.randn(3, 4, 4), torch.randn(3, 16, 8)]
    expected, images = network(images), [image.cuda() for image in images]
    network.cuda()
    for kind in ("mask", "segments"):
        network.attention = kind
        torch.testing.assert_close(network(images).cpu(), expected, rtol=1e-3, atol=1e-3)
    network.attention = "varlen"
    with torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(
            network(images).float().cpu(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max())
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_grids_of_as_many_tokens_but_another_shape_have_other_positions(name):
    network = NETWORKS[name]
    patches = torch.zeros(16, 48)  # the same tokens: positions alone differ
    grids = [(4, 4), (2, 8), (8, 2)]
    wide, square, high = (network.embed(Packed.of([patches], [coordinates_of(*g)], [g])) for g in grids)
    for one, other in itertools.combinations((wide, square, high), 2):
        assert (one - other).abs().max() > 0.05
    if name == "default":  # a patch of row 1 and column 3 is that in any image
        torch.testing.assert_close(
            square[1 * 8 + 3], network.embed(Packed.of([patches], [coordinates_of(4, 4)], [(4, 4)]))[7]
        )


@pytest.mark.parametrize("coordinates", ["fractional", "aspect"])
def test_fractional_positions_do_not_depend_on_the_size(coordinates):
    network = small(coordinates=coordinates)
    tokens = {
        g: network.embed(Packed.of([torch.zeros(g[0] * g[1], 48)], [coordinates_of(*g)], [g])) for g in ((2, 4), (4, 8))
    }
    torch.testing.assert_close(tokens[2, 4].view(2, 4, 32), tokens[4, 8].view(4, 8, 32)[::2, ::2])


@pytest.mark.parametrize("kind", [("sum", "absolute"), ("sum", "fractional"), ("table", "absolute")])
def test_gradients_of_position_tables_are_the_same_every_time(kind):
    torch.manual_seed(0)
    positions, grids = Positions(64, *kind, 16), [(16, 12)] * 100
    packed = Packed.of([torch.zeros(192, 48)] * 100, [coordinates_of(16, 12)] * 100, grids)
    weights, threads = torch.randn(192 * 100, 64), torch.get_num_threads()
    torch.set_num_threads(2)  # which race each other where a gradient is summed by index
    try:
        found = [torch.autograd.grad((positions(packed) * weights).sum(), positions.parameters()) for _ in range(6)]
    finally:
        torch.set_num_threads(threads)
    for gradients in found[1:]:
        assert all(map(torch.equal, gradients, found[0]))


def test_images_of_one_size_as_a_batch_are_those_of_a_list():
    images = torch.randn(3, 3, 12, 8)
    torch.testing.assert_close(small()(images), small()(list(images)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ((3, 3, 8), "an image of 3x8 pixels holds no patch of 4"),
        ((3, 8, 10), "an image of 8x10 pixels holds no whole number of patches of 4"),
        ((3, 4, 52), "an image of 13 patches a side is beyond --max_side 12"),
    ],
)
def test_images_that_do_not_fit_are_named(image, message):
    with pytest.raises(ValueError, match=message):
        small()([torch.zeros(image)])
    with pytest.raises(ValueError, match="an image of 9 tokens is longer than a sequence of 8"):
        first_fit([3, 9], 8)


def test_a_checkpoint_of_another_layout_is_refused(tmp_path):
    torch.save(
        {"model": {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4), "pos_embed": torch.zeros(1, 5, 8)}},
        tmp_path / "vit.pth",
    )
    with pytest.raises(WeightMismatch, match="is no NaViT: it lacks"):
        load_navit(tmp_path / "vit.pth")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_tells_what_network_it_fills(name, tmp_path):
    network = NETWORKS[name]
    torch.save({"model": network.state_dict(), "args": {}}, tmp_path / "run.pth")
    (found,), _ = load_navit(tmp_path / "run.pth")
    images = [torch.randn(3, 8, 12), torch.randn(3, 16, 8)]
    network.attention = "auto"
    torch.testing.assert_close(found(images), network(images), rtol=0, atol=0)
    assert sizes("run", network.state_dict())["positions"] == CHOICES["positions"][int(network.choices[0])]


def test_weights_of_the_related_network_of_timm_give_its_features():
    torch.manual_seed(0)
    options = {"embed_dim": 128, "depth": 2, "num_heads": 2, "pos_embed_grid_size": (4, 4), "num_classes": 7}
    theirs = timm.create_model("naflexvit_base_patch16_siglip", pos_embed_interp_mode="bilinear", **options).eval()
    tensors = checkpoint_filter_fn(theirs.state_dict())
    ours = NaViT(128, 2, 2, num_classes=7, **sizes("timm", tensors)).eval()
    ours.load_state_dict(tensors)
    images = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_weights_of_the_related_network_have_the_heads_of_their_size():
    with torch.device("meta"):
        theirs = timm.create_model("naflexvit_so400m_patch16_siglip", num_classes=0)
    tensors = checkpoint_filter_fn(theirs.state_dict())
    assert int(tensors["choices"][-1]) == theirs.blocks[0].attn.num_heads == 16


def test_operations_are_counted_as_torch_counts_them():
    network, images = small(), torch.zeros(1, 3, 16, 24)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        network(images)
    assert 1e9 * giga_operations(network, torch.tensor(24.0)) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_published_sizes():
    with torch.device("meta"):
        assert sum(p.numel() for p in build("navit_b").parameters()) / 1e6 == pytest.approx(92.6, abs=0.3)
    with pytest.raises(ValueError, match="vit_b is none of navit_micro, navit_ti"):
        build("vit_b")


# --- Draws ------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(8, 400), st.integers(1, 80), st.integers(1, 20))
def test_an_image_that_is_too_long_is_shrunk_until_it_fits(height, width, resolution, tokens, side):
    grid, chosen, shrunk = choose_grid((height, width), resolution, 8, np.arange, (tokens, side))
    free = nearest_grid((height, width), resolution, 8)
    assert len(chosen) == math.prod(grid) <= tokens and max(grid) <= side
    assert shrunk == (math.prod(free) > tokens or max(free) > side) == (grid != free)


def test_draws_have_the_stated_means():
    rng = np.random.default_rng(0)
    for kind in ("constant", "beta"):
        rates = [1 - len(Dropping(kind, 0.3, 0.8).draw(100, 0, rng)) / 100 for _ in range(2000)]
        assert np.mean(rates) == pytest.approx(0.3, abs=0.02) and max(rates) <= 0.81
    by_length = Dropping("resolution", rates=(0.1, 0.9), lengths=(10, 110))
    assert [len(by_length.draw(n, 0, rng)) / n for n in (10, 110)] == pytest.approx([0.9, 0.1], abs=0.07)
    falling = Dropping("constant", tau=-100.0, middle=1000.0)
    assert len(falling.draw(100, 0, rng)) == 20 and len(falling.draw(100, 10_000, rng)) == 80
    biased = [Resolutions(64, 384, "normal", -0.5).draw(rng) for _ in range(2000)]
    assert min(biased) >= 64 and max(biased) <= 384 and np.mean(biased) < 210


VALID = torch.tensor([True, False, True, True, True, False, True, True])


def pairs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(8, 4, generator=generator), dim=1).requires_grad_(True) for _ in range(2)]


def loss_of_part(rank: int) -> list[torch.Tensor]:
    """The loss of a process with four or with two pairs and its gradients, as their mean over the processes counts."""
    mine = VALID.nonzero()[:, 0].split([4, 2])[rank]
    inputs = [x[mine].detach().requires_grad_(True) for x in pairs()]
    images = Packed.whole([torch.zeros(3, 4, 4)] * len(mine), 4)
    model = lambda images, texts: (*inputs, torch.tensor(5.0))  # noqa: E731
    loss = loss_of_pairs(model, images, torch.arange(len(mine)), ["a caption"] * len(mine), most=4, chunks=3)
    return [loss.detach() / 2, *(gradient / 2 for gradient in torch.autograd.grad(loss, inputs))]


def test_the_contrastive_loss_is_that_of_all_pairs_in_any_chunks_and_on_processes_with_unequal_numbers_of_them():
    inputs = pairs()
    similarities = 5 * inputs[0][VALID] @ inputs[1][VALID].T
    own = torch.arange(int(VALID.sum()))
    loss = (F.cross_entropy(similarities, own) + F.cross_entropy(similarities.T, own)) / 2
    expected = torch.autograd.grad(loss, inputs)
    for chunks in (1, 3, 8):
        found = contrastive_loss(*inputs, VALID, torch.tensor(5.0), chunks)
        torch.testing.assert_close((found, *torch.autograd.grad(found, inputs)), (loss, *expected))
    parts = run_processes(loss_of_part, 2)
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss.detach())
    for i, gradient in enumerate(expected, start=1):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), gradient[VALID])
