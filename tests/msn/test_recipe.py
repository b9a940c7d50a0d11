"""Views and the sheet of views."""

import numpy as np
import pytest
import torch

from msn.augmentations import msn_views
from msn.report import GREY, hide_patches, save_view_sheet
from shared.pictures import report


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


def test_masked_patches_are_grey():
    view = torch.randint(0, 100, (3, 9, 8), dtype=torch.uint8)  # the last row is in no patch
    masked = hide_patches(view, torch.tensor([1, 2]), 4)
    assert masked.dtype == torch.uint8
    assert torch.equal(masked[:, :4, 4:], view[:, :4, 4:]) and torch.equal(masked[:, 4:8, :4], view[:, 4:8, :4])
    assert (masked[:, :4, :4] == GREY).all() and (masked[:, 4:, 4:] == GREY).all() and (masked[:, 8] == GREY).all()


@pytest.mark.parametrize("rand_views", [0, 1])
def test_the_sheet_of_views_shows_what_a_mask_hides(rand_views, tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(report, "save_sheet", lambda found, *args: rows.extend(found))
    views = [torch.zeros(1 + rand_views, 3, 16, 16, dtype=torch.uint8), torch.zeros(11, 3, 8, 8, dtype=torch.uint8)]
    save_view_sheet(views, 4, 0.5, tmp_path / "views.png")
    (target, *random), *focal = rows
    assert [len(row) for row in focal] == [10, 1]
    focal = [tile for row in focal for tile in row]
    assert not target.pixels.any() and target.title == "target, 16 px"
    titles = ["random anchor, 16 px"] * rand_views + ["focal anchor, 8 px"] * 11
    assert [tile.title for tile in (*random, *focal)] == titles
    masked, seen = (random, focal) if rand_views else (focal, [])
    assert all((tile.pixels == GREY).mean() == 0.5 for tile in masked) and not any(t.pixels.any() for t in seen)
