"""Classifiers by name: XCiT, then timm's networks, then torchvision's. None of it needs the internet."""

import difflib

import timm
import torchvision
from torch import nn

from .cross_covariance_transformer import ARCHITECTURES, build_xcit


def build_network(
    name: str,
    num_classes: int,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    img_size: int | None = None,
) -> nn.Module:
    """A randomly initialised network that maps images (B, C, H, W) to logits (B, num_classes).

    Args:
        name: A published XCiT (``xcit_small_12_p16``), or, to compare with, a model of timm or of torchvision.
        drop_rate: Dropout.
        drop_path_rate: Stochastic depth in [0, 1); not in torchvision's networks.
        img_size: Side of the images in pixels, for timm's networks whose weights depend on it.

    Raises:
        ValueError: If the name is unknown.
    """
    if name in ARCHITECTURES:
        return build_xcit(
            name, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate
        )
    if timm.is_model(name):
        options = {"num_classes": num_classes, "in_chans": in_chans, "drop_rate": drop_rate}
        options["drop_path_rate"] = drop_path_rate
        try:
            return timm.create_model(name, img_size=img_size, **options)
        except TypeError:  # convolutional networks have no image size
            return timm.create_model(name, **options)
    if name in torchvision.models.list_models(module=torchvision.models) and in_chans == 3:
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    close = difflib.get_close_matches(name, [*ARCHITECTURES, *timm.list_models()], n=3)
    raise ValueError(
        f"--model {name} is unknown{'; did you mean ' + ', '.join(close) + '?' if close else '.'} Known are "
        f"{', '.join(ARCHITECTURES)}, and the models of timm and torchvision."
    )
