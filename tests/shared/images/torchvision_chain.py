"""A recipe for views as anyone would write it with torchvision."""

import random

from PIL import ImageFilter, ImageOps
from torchvision import transforms

from shared.images.views import ViewRecipe


class Blur:
    def __init__(self, recipe):
        self.recipe = recipe

    def __call__(self, image):
        if random.random() <= self.recipe.blur_p:
            return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.recipe.blur_radius)))
        return image


class Solarize:
    def __init__(self, recipe):
        self.recipe = recipe

    def __call__(self, image):
        if random.random() < self.recipe.solarize_p:
            return ImageOps.solarize(image, self.recipe.solarize_threshold)
        return image


def torchvision_chain(recipe: ViewRecipe) -> transforms.Compose:
    """Maps a PIL image to a view, with draws from the global generators."""
    chain = [
        transforms.RandomResizedCrop(
            recipe.size_px,
            scale=recipe.scale,
            ratio=recipe.ratio,
            interpolation=transforms.InterpolationMode(recipe.interpolation),
        ),
        transforms.RandomHorizontalFlip(recipe.flip_p),
        transforms.RandomApply([transforms.ColorJitter(*recipe.jitter)], p=recipe.jitter_p),
        transforms.RandomGrayscale(recipe.grey_p),
        Blur(recipe),
    ]
    return transforms.Compose(chain + [Solarize(recipe)] * (recipe.solarize_p > 0))
