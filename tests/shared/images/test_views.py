import random

import numpy as np
import pytest
import torch
from PIL import Image

from shared.images.views import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    DrawStreams,
    ViewParams,
    ViewRecipe,
    apply_fast,
    apply_pil,
    draw_view,
)
from tests.shared.images.torchvision_chain import torchvision_chain
from tests.shared.photographs import photograph

EVERYTHING = ViewRecipe(
    size_px=32,
    scale=(0.2, 1.0),
    jitter=(0.4, 0.4, 0.2, 0.1),
    jitter_p=0.8,
    grey_p=0.2,
    blur_p=0.5,
    solarize_p=0.2,
)
STRONG_BILINEAR = ViewRecipe(
    size_px=24,
    scale=(0.05, 0.14),
    jitter=(0.8, 0.8, 0.8, 0.2),
    jitter_p=0.8,
    grey_p=0.2,
    blur_p=0.5,
    interpolation="bilinear",
)


def apply(function, pixels, view, recipe, channels=3, **keywords) -> np.ndarray:
    out = np.empty((recipe.size_px, recipe.size_px, channels), dtype=np.uint8)
    function(pixels, view, recipe, out, **keywords)
    return out


def test_streams_repeat_the_generators_of_torch_and_python():
    for seed in (0, 1, 77, 2**32 - 1, 2**40 + 5):
        streams = DrawStreams(seed, seed)
        torch.manual_seed(seed)
        random.seed(seed)
        for i in range(300):  # more words than are read at once
            assert streams.rand() == torch.rand(1).item()
            low, high = [(0.4, 1.0), (-0.1, 0.1), (0.05, 0.4)][i % 3]
            expected = torch.empty(1).uniform_(low, high).item()
            # a processor without fused multiply-add rounds the product, which is at most high - low, as well
            assert streams.uniform(low, high) == pytest.approx(expected, rel=2e-7, abs=2**-24 * (high - low))
            assert streams.randint(1 + i) == torch.randint(0, 1 + i, (1,)).item()
            assert streams.permutation(4) == torch.randperm(4).tolist()
            assert streams.python.random() == random.random()


@pytest.mark.parametrize("recipe", [EVERYTHING, STRONG_BILINEAR], ids=["bicubic", "bilinear"])
@pytest.mark.parametrize("height, width", [(90, 120), (120, 61), (16, 200), (200, 16), (5, 7), (1, 1)])
def test_pil_views_equal_the_torchvision_chain_pixel_by_pixel(recipe, height, width):
    pixels = photograph(0, height, width)
    chain = torchvision_chain(recipe)
    for seed in range(10):
        torch.manual_seed(seed)
        random.seed(seed + 1)
        streams = DrawStreams(seed, seed + 1)
        for _ in range(2):  # the second view goes on with the same streams
            expected = np.asarray(chain(Image.fromarray(pixels)))
            view = draw_view(recipe, height, width, streams)
            np.testing.assert_array_equal(apply(apply_pil, pixels, view, recipe), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_equalised_views_are_the_same_with_pillow_and_without(channels):
    recipe = ViewRecipe(size_px=48, scale=(1.0, 1.0), solarize_threshold=(0, 256))
    for seed, brightness in enumerate((1.0, 0.3, 0.02)):  # the last one has a handful of grey levels
        pixels = (photograph(seed, 48, 48) * brightness).astype(np.uint8)
        view = WHOLE._replace(height=48, width=48, equalize=True, solarize=seed == 1, solarize_threshold=40)
        if channels == 1:
            view = view._replace(grey=True)
        found, expected = (apply(function, pixels, view, recipe) for function in (apply_fast, apply_pil))
        if channels == 3:
            np.testing.assert_array_equal(found, expected)
        else:  # the luminance differs by a level here and there, which equalising magnifies
            assert np.abs(found.astype(int) - expected).mean() < 1.5
    flat = np.full((48, 48, 3), 77, dtype=np.uint8)
    assert (apply(apply_fast, flat, view._replace(solarize=False), recipe) == 77).all()


def test_levels_of_solarisation_are_drawn_from_a_range():
    recipe = ViewRecipe(size_px=8, scale=(0.5, 1.0), solarize_p=0.5, solarize_threshold=(0, 256), equalize_p=0.25)
    streams = DrawStreams(0, 0)
    views = [draw_view(recipe, 40, 50, streams) for _ in range(2000)]
    levels = [view.solarize_threshold for view in views if view.solarize]
    assert 900 < len(levels) < 1100 and min(levels) < 10 and max(levels) > 246
    assert 120 < np.mean(levels) < 136 and all(0 <= level <= 256 for level in levels)
    assert all(view.solarize_threshold is None for view in views if not view.solarize)
    assert 400 < sum(view.equalize for view in views) < 600


WHOLE = ViewParams(0, 0, 128, 128, False, (), False, 0.0, False)
SINGLE_STEPS = {  # step: (view, largest mean absolute difference between the backends, in grey levels)
    "nothing": (WHOLE, 0.0),
    "shrink": (WHOLE._replace(top=10, left=20, height=230, width=260), 0.05),
    "enlarge": (WHOLE._replace(top=10, left=20, height=90, width=70), 0.05),
    "flip": (WHOLE._replace(flip=True), 0.0),
    "brighter": (WHOLE._replace(jitter=((BRIGHTNESS, 1.37),)), 0.02),
    "darker": (WHOLE._replace(jitter=((BRIGHTNESS, 0.63),)), 0.02),
    "more contrast": (WHOLE._replace(jitter=((CONTRAST, 1.37),)), 0.02),
    "less contrast": (WHOLE._replace(jitter=((CONTRAST, 0.63),)), 0.02),
    "more colour": (WHOLE._replace(jitter=((SATURATION, 1.2),)), 0.1),
    "less colour": (WHOLE._replace(jitter=((SATURATION, 0.8),)), 0.2),
    "hue forwards": (WHOLE._replace(jitter=((HUE, 0.09),)), 0.6),
    "hue backwards": (WHOLE._replace(jitter=((HUE, -0.06),)), 0.6),
    "grey": (WHOLE._replace(grey=True), 0.01),
    "blur 0.3": (WHOLE._replace(blur_radius=0.3), 0.9),
    "blur 1.1": (WHOLE._replace(blur_radius=1.1), 0.5),
    "blur 2": (WHOLE._replace(blur_radius=2.0), 0.5),  # Pillow rounds to 8 bits six times, OpenCV once
    "solarize": (WHOLE._replace(solarize=True), 0.0),
}


@pytest.mark.parametrize("step", SINGLE_STEPS)
def test_fast_and_pil_agree_on_every_single_step(step):
    view, tolerance = SINGLE_STEPS[step]
    recipe = ViewRecipe(size_px=128, scale=(0.1, 1.0))
    for seed in range(3):
        pixels = photograph(seed, 256, 300) if view.height != 128 else photograph(seed, 128, 128)
        fast, pil = (apply(f, pixels, view, recipe).astype(int) for f in (apply_fast, apply_pil))
        assert np.abs(fast - pil).mean() <= tolerance
        assert abs((fast - pil).mean()) <= 0.25  # no drift of the brightness


def test_fast_and_pil_agree_on_whole_recipes_image_by_image():
    recipes = [EVERYTHING, STRONG_BILINEAR]
    differences = []
    for seed in range(60):
        pixels = photograph(seed % 6)
        view = draw_view(recipes[seed % 2], *pixels.shape[:2], DrawStreams(seed, seed))
        fast, pil = (apply(f, pixels, view, recipes[seed % 2]).astype(int) for f in (apply_fast, apply_pil))
        differences.append(np.abs(fast - pil).mean())
    assert np.mean(differences) < 1.5
    assert np.max(differences) < 8  # solarise turns one level at the threshold into many


@pytest.mark.parametrize("step", [{"solarize": True}, {"equalize": True}])
def test_colours_are_solarised_and_equalised_before_they_become_a_luminance(step):
    pixels, recipe = photograph(1, 128, 128), ViewRecipe(size_px=128, scale=(0.1, 1.0))
    fast, pil = (apply(f, pixels, WHOLE._replace(**step), recipe, channels=1) for f in (apply_fast, apply_pil))
    assert np.abs(fast.astype(int) - pil).max() <= 1


@pytest.mark.parametrize("function", [apply_fast, apply_pil])
def test_one_channel_is_the_luminance_of_the_colour_view(function):
    pixels = photograph(0)
    for seed in range(20):
        view = draw_view(EVERYTHING, *pixels.shape[:2], DrawStreams(seed, seed))._replace(solarize=False)
        colour = apply(function, pixels, view, EVERYTHING)
        grey = apply(function, pixels, view, EVERYTHING, channels=1)
        luminance = colour @ np.array([0.299, 0.587, 0.114])
        assert np.abs(grey[..., 0] - luminance).mean() < 1


def test_fast_leaves_the_image_untouched():
    recipe = ViewRecipe(size_px=150, scale=(1.0, 1.0))
    pixels = photograph(2, 150, 150)
    before = pixels.copy()
    for view, _ in SINGLE_STEPS.values():
        apply(apply_fast, pixels, view._replace(top=0, left=0, height=150, width=150), recipe)
    np.testing.assert_array_equal(pixels, before)


def test_a_crop_of_a_smaller_decoded_image_shows_the_same_place():
    full = photograph(3, 400, 480)
    half = np.asarray(Image.fromarray(full).resize((240, 200), Image.Resampling.BOX))
    view = WHOLE._replace(top=100, left=60, height=200, width=240, flip=True)
    recipe = ViewRecipe(size_px=64, scale=(0.1, 1.0))
    expected = apply(apply_fast, full, view, recipe).astype(int)
    assert np.abs(apply(apply_fast, half, view, recipe, scale=(0.5, 0.5)) - expected).mean() < 2
    assert np.abs(apply(apply_fast, full, view._replace(top=90), recipe) - expected).mean() > 3
