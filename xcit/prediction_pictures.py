"""``pictures/predictions.png`` of a detector or segmenter: a few images, what is in them and what the network finds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from shared.pictures.sheets import Tile, magnify, save_sheet, to_pixels

COUNT = 4
MIN_SCORE = 0.5
MIN_PX = 256  # smaller images are magnified, so that names of classes fit
OPACITY = 0.5


def color_of(label: int) -> tuple[int, int, int]:
    """RGB of a class; 20 classes differ: the ten strong colours of Matplotlib's tab20, then the ten pale ones."""
    import matplotlib  # where it draws, as in shared/pictures.py

    pair, pale = label % 10, label // 10 % 2
    return tuple(int(255 * part) for part in matplotlib.colormaps["tab20"](2 * pair + pale)[:3])


def paint_objects(image: Tensor, objects: dict[str, Tensor], classes: Sequence[str]) -> np.ndarray:
    """RGB pixels (H, W, 3) of an image with the outlines, masks and names of objects.

    Args:
        image: (3, H, W) in [0, 1].
        objects: torchvision's ``boxes`` (K, 4), ``labels`` (K,) from 1, ``masks`` (K, H, W) or (K, 1, H, W), and for
            predictions ``scores`` (K,), of which those below 0.5 are left out.
        classes: Names by label, from label 1 on.
    """
    pixels = magnify(to_pixels((image * 255).byte()), MIN_PX)
    factor = pixels.shape[0] // image.shape[1]
    objects = {name: values.cpu() for name, values in objects.items()}
    if "scores" in objects:
        kept = objects["scores"] >= MIN_SCORE
        objects = {name: values[kept] for name, values in objects.items()}
    labels = [int(label) - 1 for label in objects["labels"]]
    if not labels:
        return pixels
    masks = objects["masks"].reshape(len(labels), *image.shape[1:]) > 0.5
    masks = masks.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    names, colors = [classes[label] for label in labels], [color_of(label) for label in labels]
    if "scores" in objects:
        names = [f"{name} {score:.2f}" for name, score in zip(names, objects["scores"], strict=True)]
    painted = draw_segmentation_masks(torch.from_numpy(pixels).permute(2, 0, 1), masks, alpha=OPACITY, colors=colors)
    return to_pixels(draw_bounding_boxes(painted, objects["boxes"] * factor, names, colors, width=2))


def paint_labels(image: Tensor, labels: Tensor) -> np.ndarray:
    """RGB pixels (H, W, 3) of an image under the colours of its label map.

    Args:
        image: (3, H, W) in [0, 1].
        labels: (H, W); 255, no class, stays without a colour.
    """
    labels, painted = labels.cpu(), (image * 255).byte()
    present = [int(label) for label in labels.unique() if label != 255]
    if present:
        masks = torch.stack([labels == label for label in present])
        painted = draw_segmentation_masks(painted, masks, alpha=OPACITY, colors=[color_of(label) for label in present])
    return magnify(to_pixels(painted), MIN_PX)


def save_predictions(pairs: Sequence[tuple[np.ndarray, np.ndarray]], output_dir: Path) -> Path:
    """The sheet of a few images as RGB pixels: annotated above, predicted below."""
    above, below = zip(*pairs, strict=True)
    rows = [[Tile(pixels, "annotated") for pixels in above], [Tile(pixels, "predicted") for pixels in below]]
    folder = output_dir / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    return save_sheet(rows, folder / "predictions.png", "Images of the evaluation, annotated and predicted", [2.4, 2.4])
