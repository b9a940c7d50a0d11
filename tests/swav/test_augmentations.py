import pytest

from swav.augmentations import swav_views


def test_views_come_resolution_by_resolution():
    views = swav_views([2, 6], [224, 96], [0.14, 0.05], [1.0, 0.14])
    assert [view.size_px for view in views] == [224] * 2 + [96] * 6
    assert [view.scale for view in views] == [(0.14, 1.0)] * 2 + [(0.05, 0.14)] * 6


def test_all_views_have_the_same_colours_and_blur():
    for view in swav_views([1, 2], [32, 16], [0.14, 0.05], [1.0, 0.14]):
        assert (view.flip_p, view.jitter, view.jitter_p, view.grey_p) == (0.5, (0.8, 0.8, 0.8, 0.2), 0.8, 0.2)
        assert (view.blur_p, view.blur_radius, view.solarize_p) == (0.5, (0.1, 2.0), 0.0)
        assert (view.interpolation, view.ratio) == ("bilinear", (3 / 4, 4 / 3))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (([2, 6], [224], [0.14], [1.0]), "--nmb_crops 2 6, --size_crops 224"),
        (([2], [0], [0.14], [1.0]), "--size_crops 0"),
        (([1], [32], [0.14], [1.0]), "--nmb_crops 1: at least two"),
        (([2], [32], [0.9], [0.5]), "scale"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        swav_views(*flags)
