"""Views by resolutions: so many crops of one side and of some share of the image, then so many of another."""

import argparse
import math
from collections.abc import Callable, Sequence

from .views import ViewRecipe


def add_resolution_flags(parser: argparse.ArgumentParser, *defaults: Sequence[float]) -> Callable:
    """Numbers, sides and scales with these defaults, colours and backend; returns the ``add_argument`` of the group."""
    add = parser.add_argument_group("views").add_argument
    number, size, low, high = defaults
    add("--nmb_crops", type=int, nargs="+", default=number, help="number of crops of each resolution")
    add("--size_crops", type=int, nargs="+", default=size, help="their side in pixels")
    add("--min_scale_crops", type=float, nargs="+", default=low, help="least share of the image area of a crop")
    add("--max_scale_crops", type=float, nargs="+", default=high, help="largest share of the image area of a crop")
    add("--blur_radius", type=float, nargs=2, default=(0.1, 2.0), help="range of the blur in pixels of the view")
    add("--augmentation", default="fast", choices=("fast", "pil"), help="pil: the slow exact reference chain")
    return add


def check_assigned_crops(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message if ``--crops_for_assign`` names no crops, or there are too few ``--nmb_prototypes``."""
    numbers = args.nmb_prototypes if isinstance(args.nmb_prototypes, list) else [args.nmb_prototypes]
    if min(numbers) < 2:
        parser.error(f"--nmb_prototypes {' '.join(map(str, numbers))}: at least two are needed")
    crops = range(sum(args.nmb_crops))
    if len(set(args.crops_for_assign)) < len(args.crops_for_assign) or not set(args.crops_for_assign) <= set(crops):
        given = " ".join(map(str, args.crops_for_assign))
        parser.error(f"--crops_for_assign {given}: expected different crops from 0 to {len(crops) - 1}")


def recipes_of(args: argparse.Namespace, **colours) -> list[ViewRecipe]:
    """Recipes of the views of one image: those of the first resolution, then those of the second, ...

    Args:
        args: Flags of :func:`add_resolution_flags`.
        colours: Further arguments of all recipes.

    Raises:
        ValueError: If the lists differ in length, a number is not positive or there are fewer than two crops.
    """
    names = ("nmb_crops", "size_crops", "min_scale_crops", "max_scale_crops")
    lists = [getattr(args, name) for name in names]
    given = [f"--{name} {' '.join(map(str, values))}" for name, values in zip(names, lists, strict=True)]
    if len({len(values) for values in lists}) != 1:
        raise ValueError(f"these flags need one value for each resolution: {', '.join(given)}")
    for flag, values in zip(given, lists, strict=True):
        if min(values) <= 0:
            raise ValueError(f"{flag}: every value must be positive")
    for low, high in zip(*lists[2:], strict=True):
        if not low <= high <= 1:
            raise ValueError(f"{given[2]}, {given[3]}: expected shares of the image, the least one first")
    if not 0 <= args.blur_radius[0] <= args.blur_radius[1] < math.inf:
        raise ValueError(f"--blur_radius {' '.join(map(str, args.blur_radius))}: expected 0 <= least <= largest")
    if sum(args.nmb_crops) < 2:
        raise ValueError(f"{given[0]}: at least two crops are needed")
    return [
        ViewRecipe(size, (low, high), interpolation="bilinear", blur_radius=tuple(args.blur_radius), **colours)
        for number, size, low, high in zip(*lists, strict=True)
        for _ in range(number)
    ]
