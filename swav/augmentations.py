"""SwAV's augmentation: crops of a few sizes, all with the same flip, colours and blur (multi-crop, section 3.2)."""

from collections.abc import Sequence

from shared.images.views import ViewRecipe

FLIP_COLOR_AND_BLUR = {"flip_p": 0.5, "jitter": (0.8, 0.8, 0.8, 0.2), "jitter_p": 0.8, "grey_p": 0.2, "blur_p": 0.5}


def swav_views(
    nmb_crops: Sequence[int],
    size_crops: Sequence[int],
    min_scale_crops: Sequence[float],
    max_scale_crops: Sequence[float],
    blur_radius: tuple[float, float] = (0.1, 2.0),
) -> list[ViewRecipe]:
    """Recipes of the views of one image: those of the first resolution, then those of the second, ...

    Args:
        nmb_crops: Number of crops of each resolution.
        size_crops: Their side in pixels.
        min_scale_crops: Least share of the image area of a crop of each resolution.
        max_scale_crops: Largest share.
        blur_radius: Range of the blur's standard deviation in pixels of the view; small views need a smaller one.

    Raises:
        ValueError: If the lists differ in length, a number is not positive or there are fewer than two crops.
    """
    flags = {
        "--nmb_crops": nmb_crops,
        "--size_crops": size_crops,
        "--min_scale_crops": min_scale_crops,
        "--max_scale_crops": max_scale_crops,
    }
    if len({len(values) for values in flags.values()}) != 1:
        given = ", ".join(f"{flag} {' '.join(map(str, values))}" for flag, values in flags.items())
        raise ValueError(f"these flags need one value for each resolution: {given}")
    for flag, values in flags.items():
        if min(values) <= 0:
            raise ValueError(f"{flag} {' '.join(map(str, values))}: every value must be positive")
    if sum(nmb_crops) < 2:
        raise ValueError(f"--nmb_crops {' '.join(map(str, nmb_crops))}: at least two crops are needed")
    return [
        ViewRecipe(size, (low, high), interpolation="bilinear", blur_radius=tuple(blur_radius), **FLIP_COLOR_AND_BLUR)
        for number, size, low, high in zip(nmb_crops, size_crops, min_scale_crops, max_scale_crops, strict=True)
        for _ in range(number)
    ]
