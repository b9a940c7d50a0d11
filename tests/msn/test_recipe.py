"""Views, signs of a collapse and the sheet of views."""

import argparse

import numpy as np
import pytest
import torch

from msn import report
from msn.augmentations import msn_views
from msn.report import GREY, health_rules, mask_patches, save_view_sheet
from shared.run.health import HealthMonitor

HEALTHY = {
    "step": 100,
    "target_entropy": 0.8,
    "information": 1.5,
    "feature_spread": 0.8,
    "msn": 1.5,
    "ln_k": np.log(16),
}


def test_the_published_recipe():
    recipes = msn_views()
    assert [recipe.size_px for recipe in recipes] == [224, 224] + [96] * 10
    assert [recipe.scale for recipe in recipes[::11]] == [(0.3, 1.0), (0.05, 0.3)]
    for recipe in recipes:
        assert recipe.interpolation == "bilinear" and recipe.solarize_p == 0
        assert (recipe.flip_p, recipe.jitter_p, recipe.grey_p, recipe.blur_p) == (0.5, 0.8, 0.2, 0.5)
        np.testing.assert_allclose(recipe.jitter, (0.4, 0.4, 0.4, 0.1))
        assert recipe.blur_radius == (0.1, 2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rand_views": 0, "focal_views": 0}, "there has to be an anchor"),
        ({"focal_views": -1}, "--focal_views -1"),
        ({"focal_scale": (0.5, 0.1)}, "--focal_scale 0.5 0.1"),
        ({"color_jitter_strength": 3}, "--color_jitter_strength 3"),
    ],
)
def test_recipes_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        msn_views(**arguments)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, None),
        ({"information": 0.01}, "one assignment"),
        ({"target_entropy": 2.6, "information": 0.05}, "uniform"),
        ({"feature_spread": 0.01}, "features"),
        ({"msn": 2.77}, "flat"),
    ],
)
def test_each_collapse_is_named_once_with_a_flag_to_try(change, kind):
    monitor = monitor_of(epochs=10, warmup=0)  # of steps that wait for 50
    assert monitor.check(HEALTHY | change | {"step": 49}) is None
    sentence = monitor.check(HEALTHY | change)
    assert list(monitor.warnings) == ([kind] if kind else [])
    assert sentence is None if kind is None else "--" in sentence
    assert monitor.check(HEALTHY | change) is None


def monitor_of(**flags) -> HealthMonitor:
    return HealthMonitor(health_rules(argparse.Namespace(**flags), steps_per_epoch=20))


def test_a_start_may_look_flat():
    monitor = monitor_of(epochs=10, warmup=4)
    assert monitor.check(HEALTHY | {"msn": 2.77}) is None
    assert monitor.check(HEALTHY | {"msn": 2.77, "step": 130}) is not None


def test_masked_patches_are_grey():
    pixels = np.random.default_rng(0).integers(0, 100, (8, 8, 3), dtype=np.uint8)
    masked = mask_patches(pixels, [1, 2], 4)
    np.testing.assert_array_equal(masked[:4, 4:], pixels[:4, 4:])
    np.testing.assert_array_equal(masked[4:, :4], pixels[4:, :4])
    assert (masked[:4, :4] == GREY).all() and (masked[4:, 4:] == GREY).all()


@pytest.mark.parametrize("rand_views", [0, 1])
def test_the_sheet_of_views_shows_what_a_mask_hides(rand_views, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "save_views", lambda groups, *args, **kwargs: drawn.extend(groups))
    views = [torch.zeros(1 + rand_views, 3, 16, 16, dtype=torch.uint8), torch.zeros(11, 3, 8, 8, dtype=torch.uint8)]
    save_view_sheet(views, 4, 0.5, tmp_path / "views.png")
    (target, *random), focal = drawn
    assert not target.pixels.any() and target.title == "target, 16 px"
    assert [tile.title for tile in (*random, focal[0])] == [
        *["random anchor, 16 px"] * rand_views,
        "focal anchor, 8 px",
    ]
    masked, seen = (random, focal) if rand_views else (focal, [])
    assert all((tile.pixels == GREY).mean() == 0.5 for tile in masked) and not any(t.pixels.any() for t in seen)
