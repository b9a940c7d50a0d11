"""The views have the sizes, areas and probabilities of the paper's recipes."""

import pytest

from paws.augmentations import choose_recipe, fine_tune_view, paws_views, support_views


def test_imagenet_views():
    recipe = choose_recipe("imagenet")
    views = paws_views(recipe, 6, 1.0)
    assert [(v.size_px, v.scale) for v in views] == [(224, (0.14, 1.0))] * 2 + [(96, (0.05, 0.14))] * 6
    for v in views:
        assert (v.jitter, v.jitter_p, v.grey_p) == ((0.8, 0.8, 0.8, 0.2), 0.8, 0.2)
        assert (v.blur_p, v.blur_radius, v.solarize_p, v.equalize_p, v.flip_p) == (0.5, (0.1, 2.0), 0, 0, 0.5)
    assert [v.scale for v in paws_views(recipe, 0, 1.0)] == [(0.08, 1.0)] * 2
    assert fine_tune_view(recipe).scale == (0.08, 1.0) and fine_tune_view(recipe).jitter_p == 0


def test_cifar10_views():
    recipe = choose_recipe("cifar10")
    views = paws_views(recipe, 6, 0.5)
    assert [(v.size_px, v.scale) for v in views] == [(32, (0.75, 1.0))] * 2 + [(18, (0.3, 0.75))] * 6
    for v in views:
        assert (v.jitter, v.jitter_p, v.grey_p, v.blur_p) == ((0.4, 0.4, 0.4, 0.1), 0.8, 0, 0)
        assert (v.solarize_p, v.solarize_threshold, v.equalize_p) == (0.2, (0, 256), 0.2)
    assert [v.scale for v in paws_views(recipe, 0, 0.5)] == [(0.5, 1.0)] * 2
    whole = fine_tune_view(recipe)
    assert (whole.size_px, whole.scale, whole.ratio, whole.flip_p) == (32, (1.0, 1.0), (1.0, 1.0), 0.5)


def test_supports_have_the_views_of_the_large_ones():
    recipe = choose_recipe("cifar10")
    assert support_views(recipe, 6, 0.5, 2) == paws_views(recipe, 6, 0.5)[:2]


def test_other_sizes_and_no_normalisation():
    recipe = choose_recipe("imagenet_fine_tune", normalize=False, image_size=112, small_image_size=48)
    assert (recipe.large[0], recipe.small[0], recipe.eval_resize_px) == (112, 48, 128)
    assert recipe.mean == (0, 0, 0) and recipe.std == (1, 1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: choose_recipe("imagnet"), "--dataset imagnet"),
        (lambda: choose_recipe("imagenet", image_size=0), "--image_size 0"),
        (lambda: choose_recipe("imagenet", small_image_size=0), "--small_image_size 0"),
        (lambda: paws_views(choose_recipe("cifar10"), -1, 0.5), "--multicrop -1"),
        (lambda: support_views(choose_recipe("cifar10"), 0, 0.5, 0), "--supervised_views 0"),
    ],
)
def test_mistakes_are_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
