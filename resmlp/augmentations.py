"""The three-way augmentation of DeiT III (Touvron et al. 2022), with which later ResMLPs were trained."""

import random

import numpy as np
import torchvision.transforms as T
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from .hub import MEAN, STD


class ThreeAugment:
    """A crop, a flip, one of grey, solarisation and blur, and colour jitter (Touvron et al. 2022, section 3.2).

    Args:
        input_size: Side of the view in pixels.
        color_jitter: Strength of brightness, contrast and saturation; 0: none.
        simple_crop: Resize the short side and crop after padding by 4, instead of a random resized crop.
        in_chans: 3, or 1 for the luminance, which takes the averages of mean and standard deviation.
    """

    def __init__(self, input_size: int, color_jitter: float, simple_crop: bool = False, in_chans: int = 3):
        bicubic = T.InterpolationMode.BICUBIC
        if simple_crop:
            resize = T.Resize(input_size, interpolation=bicubic)
            crop = [resize, T.RandomCrop(input_size, padding=4, padding_mode="reflect")]
        else:
            crop = [T.RandomResizedCrop(input_size, scale=(0.08, 1.0), interpolation=bicubic)]
        jitter = [T.ColorJitter(color_jitter, color_jitter, color_jitter)] if color_jitter else []
        mean, std = (MEAN, STD) if in_chans == 3 else ([sum(MEAN) / 3], [sum(STD) / 3])
        grey = [T.Grayscale(1)] if in_chans == 1 else []
        self.chain = T.Compose(
            [*crop, T.RandomHorizontalFlip(), one_of_three, *jitter, *grey, T.ToTensor(), T.Normalize(mean, std)]
        )

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """RGB pixels (H, W, 3), uint8, to a view (C, input_size, input_size), float32."""
        return self.chain(Image.fromarray(pixels))


def one_of_three(image: Image.Image) -> Image.Image:
    """Grey, solarised or blurred, with equal probability."""
    kind = random.randrange(3)
    if kind == 0:
        return T.functional.to_grayscale(image, num_output_channels=3)
    if kind == 1:
        return ImageOps.solarize(image)
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
