"""DINO's augmentation against crops measured on the reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dino.augmentations import MEAN, STD, dino_views
from shared.images.views import DrawStreams, apply_fast, apply_pil, draw_view
from shared.multicrop import normalize_views
from tests.golden.golden_file import GoldenFile

GOLDEN = GoldenFile("dino")


def pooled_crops(apply) -> list[np.ndarray]:
    """Every view of the stored image: normalised and averaged over blocks of 8 x 8 pixels."""
    image = GOLDEN["aug/img_uint8"]
    torch_seed, python_seed = GOLDEN["aug/seeds_torch_python"].tolist()
    scales = GOLDEN["aug/scales"].tolist()
    num_crops = len(GOLDEN.keys("aug/crop"))
    streams = DrawStreams(torch_seed, python_seed)
    pooled = []
    for recipe in dino_views(scales[:2], scales[2:], num_crops - 2):
        view = draw_view(recipe, *image.shape[:2], streams)
        out = np.empty((recipe.size_px, recipe.size_px, 3), dtype=np.uint8)
        apply(image, view, recipe, out)
        (crop,) = normalize_views([torch.from_numpy(out).permute(2, 0, 1)[None]], "cpu", MEAN, STD)
        pooled.append(F.avg_pool2d(crop, 8)[0].numpy())
    return pooled


def test_the_pil_chain_makes_the_crops_of_the_reference():
    for i, crop in enumerate(pooled_crops(apply_pil)):
        np.testing.assert_allclose(crop, GOLDEN[f"aug/crop{i}_avgpool8"], atol=2e-2)


def test_the_fast_chain_makes_nearly_the_crops_of_the_reference():
    # The stored image is saturated noise, on which the coarse hue of 8-bit HSV shows most.
    for i, crop in enumerate(pooled_crops(apply_fast)):
        assert np.abs(crop - GOLDEN[f"aug/crop{i}_avgpool8"]).mean() < 0.04
        assert np.corrcoef(crop.ravel(), GOLDEN[f"aug/crop{i}_avgpool8"].ravel())[0, 1] == pytest.approx(1, abs=0.01)


def test_every_array_of_the_group_was_compared():
    assert GOLDEN.unread("aug/") == []
