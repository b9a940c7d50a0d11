"""Images as DeepCluster sees them: a centre crop to be clustered, a random crop to be classified (section 3.3)."""

from shared.images.loading import EvalTransform
from shared.images.views import ViewRecipe

from .hub import MEAN, STD


def resize_for(crop_size: int) -> int:
    """Short side in pixels of an image whose centre is cropped: 256 for a crop of 224."""
    return round(crop_size * 256 / 224)


def centre_crop(crop_size: int, normalized: bool = True, in_chans: int = 3) -> EvalTransform:
    """RGB pixels (H, W, 3) to (C, crop_size, crop_size), as for :class:`shared.images.loading.EvalTransform`."""
    mean, std = (MEAN, STD) if normalized else (None, None)
    return EvalTransform(resize_for(crop_size), crop_size, mean, std, in_chans, "bilinear")


def random_crop(crop_size: int, crop_scale: tuple[float, float]) -> ViewRecipe:
    """A random part of the image, resized and perhaps flipped.

    Args:
        crop_size: Side of the view in pixels.
        crop_scale: Range of the crop's share of the image area.
    """
    return ViewRecipe(crop_size, tuple(crop_scale), interpolation="bilinear")
