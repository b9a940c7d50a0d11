import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from dino.augmentations import MEAN, STD, dino_views, to_input


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


@pytest.mark.parametrize("scale", [(0, 1), (0.5, 0.4), (0.5, 1.1)])
def test_a_range_that_is_none_names_its_flag(scale):
    with pytest.raises(ValueError, match=f"--global_crops_scale {scale[0]} {scale[1]}"):
        dino_views(scale, (0.05, 0.4), 1)
    with pytest.raises(ValueError, match=f"--local_crops_scale {scale[0]} {scale[1]}"):
        dino_views((0.4, 1), scale, 1)


def test_a_negative_number_of_local_crops_is_refused():
    with pytest.raises(ValueError, match="--local_crops_number -1"):
        dino_views((0.4, 1.0), (0.05, 0.4), -1)


def test_networks_see_normalised_pixels_or_their_normalised_luminance():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8))
    torch.testing.assert_close(to_input(image), TF.normalize(TF.to_tensor(image), MEAN, STD))
    grey = TF.normalize(TF.to_tensor(image.convert("L")), sum(MEAN) / 3, sum(STD) / 3)
    torch.testing.assert_close(to_input(image, in_chans=1), grey)
