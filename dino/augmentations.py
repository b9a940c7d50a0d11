"""DINO's augmentation: two global views and several local ones (BYOL's colours, SwAV's multi-crop); normalisation."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared.images.views import ViewRecipe

from .hub import MEAN, STD

FLIP_AND_COLOR = {"flip_p": 0.5, "jitter": (0.4, 0.4, 0.2, 0.1), "jitter_p": 0.8, "grey_p": 0.2}
SOLARIZE_THRESHOLD = 128


def dino_views(
    global_crops_scale: tuple[float, float],
    local_crops_scale: tuple[float, float],
    local_crops_number: int,
    global_crop_size: int = 224,
    local_crop_size: int = 96,
    blur_radius: tuple[float, float] = (0.1, 2.0),
) -> list[ViewRecipe]:
    """Recipes of the views of one image: global 1, global 2, then the local ones.

    All are bicubic crops with the same flip and colours. The first global view is always blurred, the second rarely but
    it may be solarised, the local ones are blurred half of the time.

    Args:
        global_crops_scale: Range of a global crop's share of the image area.
        local_crops_scale: The same for the local crops.
        global_crop_size: Side of the global views in pixels.
        local_crop_size: Side of the local views in pixels.
        blur_radius: Range of the blur's standard deviation in pixels of the view; small views need a smaller one.
    """
    if local_crops_number < 0:
        raise ValueError(f"--local_crops_number {local_crops_number} is negative")
    for flag, (low, high) in (("global", global_crops_scale), ("local", local_crops_scale)):
        if not 0 < low <= high <= 1:
            raise ValueError(f"--{flag}_crops_scale {low} {high}: expected 0 < low <= high <= 1")
    common = {**FLIP_AND_COLOR, "blur_radius": tuple(blur_radius)}
    global_crop = {"size_px": global_crop_size, "scale": tuple(global_crops_scale), **common}
    local_crop = {"size_px": local_crop_size, "scale": tuple(local_crops_scale), **common}
    return [
        ViewRecipe(**global_crop, blur_p=1.0),
        ViewRecipe(**global_crop, blur_p=0.1, solarize_p=0.2, solarize_threshold=SOLARIZE_THRESHOLD),
        *[ViewRecipe(**local_crop, blur_p=0.5)] * local_crops_number,
    ]


def to_input(image: Image.Image, in_chans: int = 3) -> Tensor:
    """A Pillow image in RGB as the networks see it, float32, shape (in_chans, H, W).

    Args:
        in_chans: 3, or 1 for the luminance, which takes the averages of mean and standard deviation.
    """
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    if in_chans == 1:
        image, mean, std = image.convert("L"), mean.mean(dim=0, keepdim=True), std.mean(dim=0, keepdim=True)
    pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, in_chans).permute(2, 0, 1)
    return (pixels / 255 - mean[:, None, None]) / std[:, None, None]
