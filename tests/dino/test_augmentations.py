import pytest

from dino.augmentations import dino_views


def test_two_global_views_come_before_the_local_ones():
    views = dino_views((0.4, 1.0), (0.05, 0.4), 8)
    assert [view.size_px for view in views] == [224] * 2 + [96] * 8
    assert [view.scale for view in views] == [(0.4, 1.0)] * 2 + [(0.05, 0.4)] * 8


def test_only_blur_and_solarisation_tell_the_views_apart():
    first, second, *local = dino_views((0.4, 1.0), (0.05, 0.4), 3)
    assert [view.blur_p for view in (first, second, *local)] == [1.0, 0.1, 0.5, 0.5, 0.5]
    assert [view.solarize_p for view in (first, second, *local)] == [0.0, 0.2, 0.0, 0.0, 0.0]
    for view in (first, second, *local):
        assert (view.flip_p, view.jitter, view.jitter_p, view.grey_p) == (0.5, (0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
        assert (view.interpolation, view.ratio, view.blur_radius) == ("bicubic", (3 / 4, 4 / 3), (0.1, 2.0))


def test_crop_sizes_and_scales_are_free():
    views = dino_views([0.25, 1.0], [0.05, 0.25], 1, global_crop_size=32, local_crop_size=16)
    assert [(view.size_px, view.scale) for view in views] == [(32, (0.25, 1.0))] * 2 + [(16, (0.05, 0.25))]
    assert len(dino_views((0.4, 1.0), (0.05, 0.4), 0)) == 2


def test_a_negative_number_of_local_crops_is_refused():
    with pytest.raises(ValueError, match="--local_crops_number -1"):
        dino_views((0.4, 1.0), (0.05, 0.4), -1)
