"""Attention and its CPU form, stochastic depth, and positions of other grids."""

import math

import pytest
import torch

from shared.networks import vit_parts
from shared.networks.vit_parts import (
    Attention,
    DropPath,
    PatchEmbed,
    attention_written_out,
    interpolate_positions,
    scaled_dot_product_attention,
)


def test_attention_is_the_softmax_of_scaled_products_of_every_head():
    torch.manual_seed(0)
    attention = Attention(12, num_heads=3, qkv_bias=True).double()
    x = torch.randn(2, 5, 12, dtype=torch.double)
    q, k, v = attention.qkv(x).chunk(3, dim=2)
    expected = torch.zeros(2, 5, 12, dtype=torch.double)
    for b in range(2):
        for head in range(3):
            own = slice(4 * head, 4 * head + 4)
            for i in range(5):
                weights = torch.stack([(q[b, i, own] @ k[b, j, own] / math.sqrt(4)).exp() for j in range(5)])
                weights = weights / weights.sum()
                torch.testing.assert_close(attention.attention_map(x)[b, head, i], weights)
                expected[b, i, own] = sum(w * v[b, j, own] for j, w in enumerate(weights))
    torch.testing.assert_close(attention(x), attention.proj(expected))
    torch.testing.assert_close(attention(x, num_queries=2), attention.proj(expected[:, :2]))
    torch.testing.assert_close(attention.attention_map(x, num_queries=1), attention.attention_map(x)[:, :, :1])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_queries", [1, 37])
def test_attention_in_bfloat16_has_the_values_and_gradients_of_float32(num_queries, masked):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, n, 16) for n in (num_queries, 37, 37)]
    allowed = (torch.rand(2, 1, num_queries, 37) < 0.7) | (torch.arange(37) == 0) if masked else None

    def results(dtype: torch.dtype, attend) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = attend(*leaves, 0.0, 0.3, allowed)
        out.float().square().sum().backward()
        assert out.dtype == dtype
        return [x.float() for x in (out.detach(), *(leaf.grad for leaf in leaves))]

    fused = results(torch.float32, scaled_dot_product_attention)
    torch.testing.assert_close(results(torch.float32, attention_written_out), fused)
    for found, expected in zip(results(torch.bfloat16, scaled_dot_product_attention), fused, strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_the_products_are_written_out_for_gradients_in_bfloat16_of_few_tokens_only(monkeypatch):
    calls = []
    monkeypatch.setattr(vit_parts, "attention_written_out", lambda q, *_: calls.append(q) or q)
    for dtype, learns, tokens in (
        (torch.bfloat16, True, 4),
        (torch.float32, True, 4),
        (torch.bfloat16, False, 4),
        (torch.bfloat16, True, 1025),
    ):
        q = torch.randn(1, 1, tokens, 2, dtype=dtype, requires_grad=learns)
        scaled_dot_product_attention(q, q, q)
        assert len(calls) == 1


def test_dropped_paths_drop_whole_samples_and_keep_the_mean():
    torch.manual_seed(0)
    layer = DropPath(0.25).train()
    out = layer(torch.ones(4000, 3, 2))
    assert (out == out[:, :1, :1]).all()
    torch.testing.assert_close(out.unique(), torch.tensor([0, 1 / 0.75]))
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert layer.eval()(out) is out
    with pytest.raises(ValueError, match="drop_path_rate 1 is outside"):
        DropPath(1)


def test_patches_are_projected_row_by_row():
    embed = PatchEmbed(8, 4, 3, 5)
    assert embed.grid == (2, 2) and embed.num_patches == 4
    images = torch.randn(2, 3, 9, 14)  # two rows, three columns, pixels that fill no patch
    patch = images[:, :, 4:8, 8:12].flatten(1)
    expected = patch @ embed.proj.weight.flatten(1).T + embed.proj.bias
    assert embed(images).shape == (2, 6, 5)
    torch.testing.assert_close(embed(images)[:, 5], expected)
    with pytest.raises(ValueError, match="8x3 pixels holds no patch of 4"):
        embed(torch.zeros(1, 3, 8, 3))


def cubic(t: float, a: float = -0.75) -> float:
    """Keys' cubic convolution kernel with torch's coefficient."""
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def resampling_matrix(length: int, stored: int, offset: float) -> torch.Tensor:
    """(length, stored): sampling points (i + 1/2) / scale - 1/2 for a scale of (length + offset) / stored."""
    matrix = torch.zeros(length, stored, dtype=torch.double)
    for i in range(length):
        center = (i + 0.5) * stored / (length + offset) - 0.5
        for j in range(math.floor(center) - 1, math.floor(center) + 3):
            matrix[i, min(max(j, 0), stored - 1)] += cubic(center - j)
    return matrix


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize(
    ("stored", "grid"),
    [
        ((4, 4), (2, 8)),  # as many patches as stored, in other grids
        ((4, 4), (16, 1)),
        ((2, 8), (4, 4)),
        ((2, 8), (8, 2)),
        ((4, 4), (6, 6)),
        ((3, 5), (7, 2)),
    ],
)
def test_positions_of_another_grid_are_sampled_from_the_stored_one(stored, grid, offset):
    torch.manual_seed(0)
    for num_before in (0, 1, 5):
        positions = torch.randn(1, num_before + math.prod(stored), 3)
        found = interpolate_positions(positions, *grid, stored, offset)
        rows, columns = (resampling_matrix(n, s, offset) for n, s in zip(grid, stored, strict=True))
        table = positions[0, num_before:].double().view(*stored, 3)
        expected = torch.einsum("ri,cj,ijd->rcd", rows, columns, table).flatten(0, 1)
        assert found.shape == (1, num_before + math.prod(grid), 3)
        assert torch.equal(found[:, :num_before], positions[:, :num_before])
        torch.testing.assert_close(found[0, num_before:].double(), expected, rtol=1e-4, atol=1e-5)


def test_positions_of_the_stored_grid_are_untouched():
    square, oblong = torch.randn(1, 17, 3), torch.randn(1, 17, 3)
    assert interpolate_positions(square, 4, 4) is square  # square by default
    assert interpolate_positions(oblong, 2, 8, (2, 8)) is oblong
    torch.testing.assert_close(interpolate_positions(square, 2, 8), interpolate_positions(square, 2, 8, (4, 4)))


def test_positions_without_the_stored_grid_are_refused():
    with pytest.raises(ValueError, match="16 positions do not hold a grid of 3x3"):
        interpolate_positions(torch.zeros(1, 16, 2), 4, 4)
    with pytest.raises(ValueError, match="16 positions do not hold a grid of 3x6"):
        interpolate_positions(torch.zeros(1, 16, 2), 4, 4, (3, 6))
