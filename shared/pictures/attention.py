"""Pictures of attention: where the class token of a transformer looks, head by head."""

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from .sheets import Tile, colorize, magnify, save_sheet, write_png

MIN_SIDE_PX = 240  # smaller pictures are magnified
MASK_COLOR = np.array([230, 60, 40], dtype=np.uint8)


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


def to_picture(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """RGB pixels (H, W, 3), uint8, of a normalised image (C, H, W); one channel uses the averages of mean and std."""
    mean, std = torch.tensor(mean), torch.tensor(std)
    if len(image) == 1:
        mean, std = mean.mean(dim=0, keepdim=True), std.mean(dim=0, keepdim=True)
    pixels = image.cpu() * std[:, None, None] + mean[:, None, None]
    pixels = (255 * pixels).round().clamp(0, 255).byte().expand(3, -1, -1)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def save_attention_maps(
    attention: Tensor,
    image: Tensor,
    patch_size: int,
    output_dir: str | Path,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    threshold: float | None = None,
) -> list[Path]:
    """Write the attention of one image: a sheet of everything, and every map as a file of its own.

    Files: ``attention.png`` (the sheet), ``img.png``, ``attn-head{j}.png`` and ``attn-mean.png`` (maps),
    ``overlay-head{j}.png`` and ``overlay-mean.png`` (on the image); with a threshold also
    ``mask_th{t}_head{j}.png`` and ``mask_th{t}_mean.png``.

    Args:
        attention: Of the class token to the patches, shape (heads, rows, columns).
        image: Normalised, shape (C, H, W); rows and columns beyond the patches are cut off.
        patch_size: Side of a patch in pixels.
        output_dir: Created if missing.
        mean, std: What the image was normalised with.
        threshold: Share of the attention that the masks hold, in (0, 1].

    Returns:
        The paths, the sheet first.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    attention = attention.float().cpu()
    attention = torch.cat([attention, attention.mean(dim=0, keepdim=True)])
    names = [*(f"head{j}" for j in range(len(attention) - 1)), "mean"]
    rows, columns = attention.shape[-2:]
    pixels = magnify(to_picture(image[:, : rows * patch_size, : columns * patch_size], mean, std), MIN_SIDE_PX)
    patch_px = pixels.shape[0] // rows

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
