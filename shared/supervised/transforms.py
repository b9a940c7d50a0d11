"""Views for supervised training, made by timm's transforms, and those for evaluation."""

import argparse
import random
from collections.abc import Sequence

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image, ImageOps
from timm.data import auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from shared.images.loading import EvalTransform

SMALL_PX = 32  # up to this size images are padded and cropped, not resized to a random crop


class TrainTransform:
    """A random crop, a flip, RandAugment (or colour jitter), normalisation and Random Erasing, as timm does them.

    Up to 32 pixels the random resized crop is a random crop after padding by 4, of images that are resized to the
    input size if they have another one; not where a ``crop_scale`` is given.

    Args:
        input_size: Side of the view in pixels.
        mean, std: Per channel, for pixels in [0, 1]; one channel takes the averages over the channels.
        auto_augment: timm's specification, such as ``rand-m9-mstd0.5-inc1``; None: colour jitter.
        color_jitter: Its strength, None: none; not used with ``auto_augment``.
        interpolation: ``bicubic``, ``bilinear`` or ``random``.
        erase_p, erase_mode, erase_count: Random Erasing.
        in_chans: 3, or 1 for the luminance.
        crop_scale: Area of the random resized crops as a share of the image; None: timm's, 0.08 to 1.
        flip: Whether half of the views are mirrored.
        augment_flag: Where ``auto_augment`` was given, for messages.

    Raises:
        ValueError: If timm does not understand ``auto_augment``.
    """

    def __init__(
        self,
        input_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        color_jitter: float | None = 0.4,
        interpolation: str = "bicubic",
        erase_p: float = 0.25,
        erase_mode: str = "pixel",
        erase_count: int = 1,
        in_chans: int = 3,
        crop_scale: tuple[float, float] | None = None,
        flip: bool = True,
        augment_flag: str = "--aa",
    ):
        self.in_chans = in_chans
        try:
            crop, self.augment, self.finish = create_transform(
                input_size,
                is_training=True,
                separate=True,
                scale=crop_scale,
                hflip=0.5 if flip else 0.0,
                color_jitter=color_jitter,
                auto_augment=auto_augment,
                interpolation=interpolation,
                mean=mean,
                std=std,
                re_prob=erase_p,
                re_mode=erase_mode,
                re_count=erase_count,
            )
        except AssertionError as error:
            raise ValueError(f"{augment_flag} {auto_augment}: {error}") from error
        posterize_to_nothing(self.augment)
        if input_size <= SMALL_PX and crop_scale is None:
            pad_and_crop = [T.Resize((input_size, input_size)), T.RandomCrop(input_size, padding=4)]
            crop = T.Compose([*pad_and_crop, *crop.transforms[1:]])
        self.crop = crop
        if in_chans == 1:
            normalize = T.Normalize([sum(mean) / 3], [sum(std) / 3])
            steps = [normalize if isinstance(step, T.Normalize) else step for step in self.finish.transforms]
            self.finish = T.Compose(steps)

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """RGB pixels (H, W, 3), uint8, to a view (C, input_size, input_size), float32.

        Of float pixels (H, W, C), which are normalised already, colours are left as they are.
        """
        if pixels.dtype == np.float32:
            view = self.crop(torch.from_numpy(pixels).permute(2, 0, 1))
            return T.Compose([step for step in self.finish.transforms if isinstance(step, RandomErasing)])(view)
        image = self.augment(self.crop(Image.fromarray(pixels)))
        return self.finish(image.convert("L") if self.in_chans == 1 else image)


def posterize_to_nothing(augment: T.Compose) -> None:
    """Let timm's augmentations posterize to 0 bits, which their strongest level asks for and Pillow 13 refuses."""
    for step in augment.transforms:
        operations = getattr(step, "ops", None) or [op for ops in getattr(step, "policy", ()) for op in ops]
        for operation in operations:
            if getattr(operation, "aug_fn", None) is auto_augment.posterize:
                operation.aug_fn = posterize


def posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """Keep the highest bits of every channel; 0 bits are a black image."""
    return ImageOps.posterize(image, min(bits, 8)) if bits > 0 else Image.new(image.mode, image.size)


def train_transform(args: argparse.Namespace, mean: Sequence[float], std: Sequence[float]) -> TrainTransform:
    """The views that the flags of :func:`shared.supervised.flags.add_augmentation_flags` ask for."""
    return TrainTransform(
        args.input_size,
        mean,
        std,
        auto_augment=None if args.aa in ("", "none") else args.aa,
        color_jitter=args.color_jitter,
        interpolation=args.train_interpolation,
        erase_p=args.reprob,
        erase_mode=args.remode,
        erase_count=args.recount,
        in_chans=args.in_chans,
    )


def eval_transform(
    input_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crop_ratio: float = 0.875,
    in_chans: int = 3,
    interpolation: str = "bicubic",
) -> EvalTransform:
    """The centre of the image, its short side resized to ``input_size / crop_ratio``; small images as a whole."""
    short_px = input_size if input_size <= SMALL_PX else int(input_size / crop_ratio)
    return EvalTransform(short_px, input_size, mean, std, in_chans, interpolation)


def seed_transforms(seed: int) -> None:
    """Seed the generators from which timm's transforms draw: python's, numpy's and torch's on the CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
