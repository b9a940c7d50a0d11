"""Pictures of attention: where the class token of a transformer looks, head by head; flags to choose an image."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from shared.images.decode import read_image
from shared.images.sources import open_source
from shared.multicrop import normalize_views
from shared.run.flags import add_device_flag

from .sheets import Tile, colorize, magnify, normalised_pixels, save_sheet, write_png

EMBEDDED_IMAGE = 5  # whose attention is shown by default

MIN_SIDE_PX = 240  # smaller pictures are magnified
MASK_COLOR = np.array([230, 60, 40], dtype=np.uint8)


# --- The image --------------------------------------------------------------------------------------------------------


def add_image_flags(parser: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    """Which image is looked at, and where the pictures go; returns the ``add_argument`` of the group."""
    add = parser.add_argument_group("image").add_argument
    add("--image_path", default=None, help="any image file")
    add("--image_size", type=int, nargs="+", default=[480, 480], help="height and width, or the short side, in pixels")
    add("--threshold", type=float, default=None, help="also show the patches that hold this share of the attention")
    add("--output_dir", default=".", help="where the pictures go")
    add_device_flag(add)
    return add


def parse_image_flags(
    parser: argparse.ArgumentParser, arguments: list[str] | None, weights: Sequence[str], embedded_defaults: dict
) -> argparse.Namespace:
    """Parse and check; with neither image nor weights the defaults are those of the embedded images (``embedded``).

    Args:
        weights: Names of the flags for weights.
    """
    args = parser.parse_args(arguments)
    embedded = args.image_path is None and not any(getattr(args, flag) for flag in weights)
    if embedded:
        parser.set_defaults(output_dir="runs/materials/attention", image_size=[32, 32], **embedded_defaults)
        args = parser.parse_args(arguments)
    args.embedded = embedded
    if args.threshold is not None and not 0 < args.threshold <= 1:
        parser.error(f"--threshold {args.threshold} is not in (0, 1]")
    if len(args.image_size) > 2 or min(args.image_size) < 1:
        parser.error(f"--image_size {args.image_size}: give one or two positive numbers")
    return args


def chosen_image(args: argparse.Namespace) -> np.ndarray:
    """RGB pixels (H, W, 3), uint8, of what the flags name: a file, an embedded image, or a photograph."""
    if args.image_path is not None:
        return read_image(args.image_path).decode()
    if args.embedded:
        return open_source(None, "val").load(EMBEDDED_IMAGE).decode()
    from sklearn.datasets import load_sample_image  # a second of SciPy, of which the training needs nothing

    return load_sample_image("flower.jpg")


def prepare_image(
    pixels: np.ndarray, image_size: Sequence[int], mean: Sequence[float], std: Sequence[float], in_chans: int = 3
) -> Tensor:
    """Resize (bilinear, as Pillow does it) and normalise RGB pixels (H, W, 3), uint8, to (in_chans, height, width).

    Args:
        image_size: Height and width in pixels, or the short side.
        in_chans: 3, or 1 for the luminance.

    Raises:
        ValueError: For a network of other channels.
    """
    if in_chans not in (1, 3):
        raise ValueError(f"the network takes {in_chans} channels, the image is RGB; see the pictures of the run")
    height, width = pixels.shape[:2]
    if len(image_size) == 1:
        short = min(height, width)
        image_size = (int(image_size[0] * height / short), int(image_size[0] * width / short))
    image = Image.fromarray(pixels).resize(image_size[::-1], Image.Resampling.BILINEAR)
    resized = np.array(image.convert("L") if in_chans == 1 else image).reshape(*image_size, in_chans)
    return normalize_views([torch.from_numpy(resized).permute(2, 0, 1)[None]], "cpu", mean, std)[0][0]


# --- Attention --------------------------------------------------------------------------------------------------------


def vit_class_row(network: nn.Module, images: Tensor) -> Tensor:
    """Attention of a ViT's class token to all tokens in the last block, (B, heads, 1 + N)."""
    return network.get_last_selfattention(images, num_queries=1)[:, :, 0]


@torch.no_grad()
def class_attention(network: nn.Module, images: Tensor, class_row: Callable = vit_class_row) -> Tensor:
    """Attention of the class token to the patches in the last block.

    Args:
        images: Normalised, shape (B, C, H, W); rows and columns beyond a multiple of the patch size are not seen.
        class_row: As :func:`vit_class_row`, for the kind of network.

    Returns:
        Shape (B, heads, H / patch, W / patch); the share of the class token itself is missing from the sum of 1.

    Raises:
        ValueError: If the image is smaller than a patch.
    """
    patch_size = network.patch_embed.patch_size
    rows, columns = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    if rows == 0 or columns == 0:
        raise ValueError(f"--image_size: {tuple(images.shape[-2:])} pixels are less than a patch of {patch_size}")
    images = images[:, :, : rows * patch_size, : columns * patch_size]
    return class_row(network, images)[:, :, 1:].unflatten(2, (rows, columns))


def attended_patches(attention: Tensor, threshold: float) -> Tensor:
    """The most attended patches of each head that together hold the share ``threshold`` of its attention.

    Args:
        attention: Shape (..., h, w).
        threshold: In (0, 1].

    Returns:
        Boolean mask of the same shape.
    """
    flat = attention.flatten(-2)
    ascending, order = flat.sort(dim=-1, stable=True)
    kept = ascending.cumsum(dim=-1) / ascending.sum(dim=-1, keepdim=True) > 1 - threshold
    return torch.zeros_like(kept).scatter(-1, order, kept).view_as(attention)


def overlay_attention(pixels: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """The image under the colours of a map (H, W) of the same size."""
    return (0.45 * pixels + 0.55 * colorize(attention)).round().astype(np.uint8)


def overlay_mask(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with the region ``mask`` (H, W) coloured and outlined."""
    picture = pixels.copy()
    picture[mask] = (0.5 * pixels[mask] + 0.5 * MASK_COLOR).round().astype(np.uint8)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(picture, contours, -1, (255, 255, 255), thickness=max(1, min(mask.shape) // 160))


def save_attention(
    network: nn.Module,
    image: Tensor,
    output_dir: str | Path,
    mean: Sequence[float],
    std: Sequence[float],
    threshold: float | None = None,
    class_row: Callable = vit_class_row,
) -> list[Path]:
    """Write the attention of one image: a sheet of everything, and every map as a file of its own.

    Files: ``attention.png`` (the sheet), ``img.png``, ``attn-head{j}.png`` and ``attn-mean.png`` (maps),
    ``overlay-head{j}.png`` and ``overlay-mean.png`` (on the image); with a threshold also
    ``mask_th{t}_head{j}.png`` and ``mask_th{t}_mean.png``.

    Args:
        image: Normalised with ``mean`` and ``std``, shape (C, H, W), on the network's device.
        output_dir: Created if missing.
        threshold: Share of the attention that the masks hold, in (0, 1].
        class_row: See :func:`class_attention`.

    Returns:
        The paths, the sheet first.
    """
    training = network.training
    attention = class_attention(network.eval(), image[None], class_row)[0].float().cpu()
    network.train(training)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    attention = torch.cat([attention, attention.mean(dim=0, keepdim=True)])
    names = [*(f"head{j}" for j in range(len(attention) - 1)), "mean"]
    seen = [patches * network.patch_embed.patch_size for patches in attention.shape[-2:]]
    pixels = magnify(normalised_pixels(image[:, : seen[0], : seen[1]], mean, std), MIN_SIDE_PX)
    patch_px = pixels.shape[0] // attention.shape[-2]

    def enlarge(maps: Tensor) -> np.ndarray:  # every patch becomes a square of the picture's size
        return maps.numpy().repeat(patch_px, axis=-2).repeat(patch_px, axis=-1)

    pictures = {"img.png": pixels}
    maps, overlays, masks = [], [], []
    for name, values in zip(names, enlarge(attention), strict=True):
        maps.append(colorize(values))
        overlays.append(overlay_attention(pixels, values))
        pictures |= {f"attn-{name}.png": maps[-1], f"overlay-{name}.png": overlays[-1]}
    if threshold is not None:
        for name, mask in zip(names, enlarge(attended_patches(attention, threshold)), strict=True):
            masks.append(overlay_mask(pixels, mask))
            pictures[f"mask_th{threshold}_{name}.png"] = masks[-1]

    titles = [*(f"head {j}" for j in range(len(names) - 1)), "mean of heads"]
    sheet = [[Tile(pixels, "image"), *(Tile(p, t) for p, t in zip(maps, titles, strict=True))]]
    for kind in filter(None, (overlays, masks)):
        sheet.append([Tile(np.full_like(pixels, 255)), *(Tile(picture) for picture in kind)])
    heading = (
        "Attention of the class token in the last block\n"
        "First row: from the least (dark blue) to the most attended patch (yellow) of each head. "
        "Second row: the same on the image."
    )
    if masks:
        heading += f"\nThird row: the patches that together hold {100 * threshold:g} % of the attention."
    return [
        save_sheet(sheet, output_dir / "attention.png", heading, [1.6] * len(sheet)),
        *(write_png(output_dir / name, picture) for name, picture in pictures.items()),
    ]
