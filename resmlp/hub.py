"""Entries of torch.hub."""

from torch import nn

from . import pretrained as released
from .resmlp_models import ARCHITECTURES


def entry(arch: str, variant: str, pretrained: bool, **options) -> nn.Module:
    build = ARCHITECTURES[arch]
    if not pretrained:
        return build(**options)
    release = f"{arch}_{variant}"
    tensors = released.read_weights(release)
    network = build(**{"num_classes": released.shape_of(tensors, release)["num_classes"], **options})
    released.fill(network, tensors, release)
    return network


def resmlp_12(pretrained: bool = True, dist: bool = False, dino: bool = False, **kwargs) -> nn.Module:
    """ResMLP-S12 (76.6 on ImageNet; ``dist``: distilled, 77.8; ``dino``: self-supervised, k-NN 62.6)."""
    return entry("resmlp_12", "dist" if dist else "dino" if dino else "no_dist", pretrained, **kwargs)


def resmlp_24(pretrained: bool = True, dist: bool = False, dino: bool = False, **kwargs) -> nn.Module:
    """ResMLP-S24 (79.4 on ImageNet; ``dist``: distilled, 80.8; ``dino``: self-supervised, k-NN 69.4)."""
    return entry("resmlp_24", "dist" if dist else "dino" if dino else "no_dist", pretrained, **kwargs)


def resmlp_36(pretrained: bool = True, dist: bool = False, **kwargs) -> nn.Module:
    """ResMLP-S36 (79.7 on ImageNet; ``dist``: distilled, 81.1)."""
    return entry("resmlp_36", "dist" if dist else "no_dist", pretrained, **kwargs)


def resmlpB_24(pretrained: bool = True, dist: bool = False, in_22k: bool = False, **kwargs) -> nn.Module:
    """ResMLP-B24/8 (``dist``: distilled, 83.6 on ImageNet; ``in_22k``: first trained on ImageNet-22k, 84.4)."""
    return entry("resmlpB_24", "dist" if dist else "22k" if in_22k else "no_dist", pretrained, **kwargs)


ENTRIES = {function.__name__: function for function in (resmlp_12, resmlp_24, resmlp_36, resmlpB_24)}
