"""PAWS's recipes: two large views and several small ones, for ImageNet, CIFAR-10 and the embedded materials."""

from dataclasses import dataclass, replace

from shared.images.views import ViewRecipe

from .hub import MEAN, STD


@dataclass(frozen=True)
class Recipe:
    """How views of one kind of images are made (appendix C).

    Attributes:
        large, small: Side in pixels and area range of the views with small views beside them.
        large_scale_alone: Area range of the large views without small ones.
        common: Arguments of :class:`shared.images.views.ViewRecipe` that all views share; jitter for a strength of 1.
        eval_resize_px: Short side before the centre crop of the evaluation.
        fine_tune_scale: Area range of the crops of fine-tuning; None: the centre crop.
        mean, std: Of the pixels in [0, 1], per channel.
    """

    large: tuple[int, tuple[float, float]]
    small: tuple[int, tuple[float, float]]
    large_scale_alone: tuple[float, float]
    common: dict
    eval_resize_px: int
    fine_tune_scale: tuple[float, float] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


BILINEAR = {"interpolation": "bilinear"}
COMMON = {**BILINEAR, "jitter": (0.8, 0.8, 0.8, 0.2), "jitter_p": 0.8}
RECIPES = {
    "imagenet": Recipe(
        large=(224, (0.14, 1.0)),
        small=(96, (0.05, 0.14)),
        large_scale_alone=(0.08, 1.0),
        common={**COMMON, "grey_p": 0.2, "blur_p": 0.5, "blur_radius": (0.1, 2.0)},
        eval_resize_px=256,
        fine_tune_scale=(0.08, 1.0),
        mean=MEAN,
        std=STD,
    ),
    "cifar10": Recipe(
        large=(32, (0.75, 1.0)),
        small=(18, (0.3, 0.75)),
        large_scale_alone=(0.5, 1.0),
        common={**COMMON, "solarize_p": 0.2, "solarize_threshold": (0, 256), "equalize_p": 0.2},
        eval_resize_px=32,
        fine_tune_scale=None,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
    # 8 x 8 pixels: a mirrored digit is none, and a small part of one could be any; at a larger size a network that
    # averages over positions cannot tell digits apart before it has learned, and the first pseudo-labels mislead it
    "digits": Recipe(
        large=(8, (0.75, 1.0)),
        small=(6, (0.5, 0.8)),
        large_scale_alone=(0.75, 1.0),
        common={**COMMON, "flip_p": 0.0},
        eval_resize_px=8,
        fine_tune_scale=(0.75, 1.0),
        mean=(0.3, 0.3, 0.3),
        std=(0.37, 0.37, 0.37),
    ),
}


def choose_recipe(
    dataset: str, normalize: bool = True, image_size: int | None = None, small_image_size: int | None = None
) -> Recipe:
    """The recipe that ``--dataset`` names (``imagenet_fine_tune`` is ``imagenet``), with other sizes if given.

    Args:
        normalize: Without it pixels stay in [0, 1].
        image_size, small_image_size: Sides of the views in pixels in place of the recipe's.

    Raises:
        ValueError: If the name is unknown.
    """
    name = dataset.removesuffix("_fine_tune")
    if name not in RECIPES:
        raise ValueError(f"--dataset {dataset} is none of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    for flag, side in (("image_size", image_size), ("small_image_size", small_image_size)):
        if side is not None and side < 1:
            raise ValueError(f"--{flag} {side} is less than 1")
    if image_size is not None:
        resize_px = round(image_size * recipe.eval_resize_px / recipe.large[0])
        recipe = replace(recipe, large=(image_size, recipe.large[1]), eval_resize_px=resize_px)
    if small_image_size is not None:
        recipe = replace(recipe, small=(small_image_size, recipe.small[1]))
    return recipe if normalize else replace(recipe, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def paws_views(recipe: Recipe, multicrop: int, color_jitter_strength: float) -> list[ViewRecipe]:
    """Recipes of the views of an unlabelled image: two large ones, then ``multicrop`` small ones."""
    if multicrop < 0:
        raise ValueError(f"--multicrop {multicrop} is negative")
    size, scale = recipe.large
    large = view(recipe, size, scale if multicrop else recipe.large_scale_alone, color_jitter_strength)
    return [large] * 2 + [view(recipe, *recipe.small, color_jitter_strength)] * multicrop


def support_views(recipe: Recipe, multicrop: int, color_jitter_strength: float, views: int) -> list[ViewRecipe]:
    """Recipes of the views of a labelled image: those of a large view, drawn ``views`` times."""
    if views < 1:
        raise ValueError(f"--supervised_views {views} is less than 1")
    return paws_views(recipe, multicrop, color_jitter_strength)[:1] * views


def view(recipe: Recipe, size_px: int, scale: tuple[float, float], strength: float) -> ViewRecipe:
    """One view of the recipe with its colours, jittered by ``strength`` times the strongest."""
    if not 0 <= strength <= 2.5:  # a hue of 0.5 is the whole circle
        raise ValueError(f"--color_jitter_strength {strength} is outside [0, 2.5]")
    jitter = tuple(strength * value for value in recipe.common["jitter"])
    return ViewRecipe(size_px, scale, **{**recipe.common, "jitter": jitter})


def fine_tune_view(recipe: Recipe) -> ViewRecipe:
    """A random crop and a flip: what fine-tuning sees."""
    size, _ = recipe.large
    flip_p = recipe.common.get("flip_p", 0.5)
    if recipe.fine_tune_scale is None:  # the whole image, which is as large as the view
        return ViewRecipe(size, (1.0, 1.0), (1.0, 1.0), flip_p, **BILINEAR)
    return ViewRecipe(size, recipe.fine_tune_scale, flip_p=flip_p, **BILINEAR)
