"""MSN's views: one target and several anchors, random ones as large as the target and small focal ones."""

from shared.images.views import ViewRecipe


def msn_views(
    rand_size: int = 224,
    focal_size: int = 96,
    rand_views: int = 1,
    focal_views: int = 10,
    color_jitter_strength: float = 0.5,
    rand_scale: tuple[float, float] = (0.3, 1.0),
    focal_scale: tuple[float, float] = (0.05, 0.3),
    blur_radius: tuple[float, float] = (0.1, 2.0),
) -> list[ViewRecipe]:
    """Recipes of the views of one image: the target, the random anchors, the focal anchors.

    All are bilinear crops with the same flip, colours and blur; they differ in their size and share of the image.

    Args:
        rand_size: Side of the target and of the random anchors in pixels.
        focal_size: Side of the focal anchors in pixels.
        rand_views: Random anchors.
        focal_views: Focal anchors.
        color_jitter_strength: s; brightness, contrast and saturation change by 0.8 s, the hue by 0.2 s.
        rand_scale: Range of the share of the image area of the target and the random anchors.
        focal_scale: The same for the focal anchors.
        blur_radius: Range of the blur's standard deviation in pixels of the view; small views need a smaller one.

    Raises:
        ValueError: If there is no anchor, or a range is none.
    """
    if min(rand_views, focal_views) < 0 or rand_views + focal_views < 1:
        raise ValueError(f"--rand_views {rand_views} --focal_views {focal_views}: there has to be an anchor")
    for flag, (low, high) in (("rand", rand_scale), ("focal", focal_scale)):
        if not 0 < low <= high <= 1:
            raise ValueError(f"--{flag}_scale {low} {high}: expected 0 < low <= high <= 1")
    if not 0 <= color_jitter_strength <= 2.5:  # a hue of 0.5 is the whole circle
        raise ValueError(f"--color_jitter_strength {color_jitter_strength} is outside [0, 2.5]")
    s = color_jitter_strength
    common = {
        "jitter": (0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s),
        "jitter_p": 0.8,
        "grey_p": 0.2,
        "blur_p": 0.5,
        "blur_radius": tuple(blur_radius),
        "interpolation": "bilinear",
    }
    random_view = ViewRecipe(rand_size, tuple(rand_scale), **common)
    focal_view = ViewRecipe(focal_size, tuple(focal_scale), **common)
    return [random_view] * (1 + rand_views) + [focal_view] * focal_views
