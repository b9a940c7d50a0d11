"""Classifiers by name: ResMLP, then timm's networks, then torchvision's. None of it needs the internet."""

import difflib

import timm
import torchvision
from torch import nn

from .resmlp_models import ARCHITECTURES


def build_network(
    name: str,
    num_classes: int,
    img_size: int = 224,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    **sizes: int | None,
) -> nn.Module:
    """A randomly initialised network that maps images (B, C, H, W) to logits (B, num_classes).

    Args:
        name: A published ResMLP (``resmlp_24``), or, to compare with, a model of timm or of torchvision.
        img_size: Side of the images in pixels, for networks whose weights depend on it.
        drop_rate: Dropout.
        drop_path_rate: Stochastic depth in [0, 1); not in torchvision's networks.
        sizes: ``patch_size``, ``embed_dim`` and ``depth`` of a ResMLP or of a ViT of timm; None: the published one.

    Raises:
        ValueError: If the name is unknown, or the patches do not fill the image.
    """
    options = {"num_classes": num_classes, "in_chans": in_chans, "drop_rate": drop_rate}
    options["drop_path_rate"] = drop_path_rate
    sizes = {size: value for size, value in sizes.items() if value is not None}
    if name in ARCHITECTURES:
        return ARCHITECTURES[name](img_size=img_size, **sizes, **options)
    in_torchvision = name in torchvision.models.list_models(module=torchvision.models) and in_chans == 3
    given = " ".join(f"--{size.replace('_', '-')} {value}" for size, value in sizes.items())
    if timm.is_model(name):
        try:
            return timm.create_model(name, img_size=img_size, **sizes, **options)
        except TypeError as error:  # convolutional networks have no image size, and none of the others
            if not sizes:
                return timm.create_model(name, **options)
            raise ValueError(f"{given}: the sizes of --model {name} are part of its name") from error
    if in_torchvision and sizes:
        raise ValueError(f"{given}: the sizes of --model {name} are part of its name")
    if in_torchvision:
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    close = difflib.get_close_matches(name, [*ARCHITECTURES, *timm.list_models()], n=3)
    raise ValueError(
        f"--model {name} is unknown{'; did you mean ' + ', '.join(close) + '?' if close else '.'} Known are "
        f"{', '.join(ARCHITECTURES)}, and the models of timm and torchvision."
    )
