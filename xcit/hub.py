"""Entries of torch.hub."""

from collections.abc import Callable

from torch import nn

from . import pretrained as released
from .cross_covariance_transformer import build_xcit

TOP1 = {  # of the variants 224 / 224_dist / 384_dist
    "xcit_nano_12_p16": ("N12/16", "69.9 / 72.2 / 75.4"),
    "xcit_nano_12_p8": ("N12/8", "73.8 / 76.3 / 77.8"),
    "xcit_tiny_12_p16": ("T12/16", "77.1 / 78.6 / 80.9"),
    "xcit_tiny_12_p8": ("T12/8", "79.7 / 81.2 / 82.4"),
    "xcit_tiny_24_p16": ("T24/16", "79.4 / 80.4 / 82.6"),
    "xcit_tiny_24_p8": ("T24/8", "81.9 / 82.6 / 83.7"),
    "xcit_small_12_p16": ("S12/16", "82.0 / 83.3 / 84.7"),
    "xcit_small_12_p8": ("S12/8", "83.4 / 84.2 / 85.1"),
    "xcit_small_24_p16": ("S24/16", "82.6 / 83.9 / 85.1"),
    "xcit_small_24_p8": ("S24/8", "83.9 / 84.9 / 85.6"),
    "xcit_medium_24_p16": ("M24/16", "82.7 / 84.3 / 85.4"),
    "xcit_medium_24_p8": ("M24/8", "83.7 / 85.1 / 85.8"),
    "xcit_large_24_p16": ("L24/16", "82.9 / 84.9 / 85.8"),
    "xcit_large_24_p8": ("L24/8", "84.4 / 85.4 / 86.0"),
}


def entry(name: str) -> Callable[..., nn.Module]:
    """The function of torch.hub for a published network, with its classifier."""

    def build(pretrained: bool = True, variant: str = "224", **kwargs) -> nn.Module:
        network = build_xcit(name, **kwargs)
        if pretrained:
            release = f"{name}_{variant}"
            released.fill(network, released.read_weights(release), release)
        return network

    size, top1 = TOP1[name]
    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"XCiT-{size}; top-1 of the variants 224 / 224_dist / 384_dist: {top1}."
    return build


ENTRIES = {name: entry(name) for name in TOP1}
