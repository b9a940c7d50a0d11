"""Networks by name, and networks from checkpoint files, the official ones included."""

import dataclasses
import re
from pathlib import Path

from torch import Tensor, nn

from shared.networks.backbones import build_library_backbone
from shared.networks.weights import WeightMismatch, load_backbone_weights, safe_load, select_backbone_weights

from .networks import ClusterNetwork, alexnet, vgg16
from .pretrained import RELEASES, fetch

PAPER = {"alexnet": alexnet, "vgg16": vgg16}
OFFICIAL_CROP_SIZE = 224


def build_network(
    arch: str, sobel: bool = False, out: int | None = None, img_size: int = OFFICIAL_CROP_SIZE, bn: bool = True
) -> ClusterNetwork:
    """Build a randomly initialised network with a top layer of ``out`` outputs (None: without).

    Args:
        arch: ``alexnet``, ``vgg16`` (those of the paper), a classification model of torchvision, or a model of timm.
        sobel: Whether the network looks at Sobel gradients instead of colours.
        img_size: Side of the images in pixels.
        bn: Batch normalisation, in the two networks of the paper.

    Raises:
        ValueError: If the name is unknown or the images are too small for the network.
    """
    if arch in PAPER:
        return PAPER[arch](sobel, bn, out, img_size)
    backbone, dim = build_library_backbone(arch, img_size=img_size, in_chans=2 if sobel else 3, own_names=tuple(PAPER))
    return ClusterNetwork(backbone, nn.Sequential(), dim, sobel, out, img_size)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def official_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as in the official checkpoints, whose convolutional part is wrapped for several GPUs."""
    return {re.sub(r"^features\.", "features.module.", name): value for name, value in state_dict.items()}


def plain_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers for several GPUs add."""
    return {re.sub(r"(^|\.)module\.", r"\1", name): value for name, value in state_dict.items()}


def fill_network(network: ClusterNetwork, checkpoint: dict, arch: str, origin: str) -> dict[str, Tensor]:
    """Fill a network without a top layer from a checkpoint whose weights must be exactly those of ``arch``.

    Returns:
        The state dict of the checkpoint's top layer, empty if it has none.

    Raises:
        ValueError: If the checkpoint is of another network.
    """
    if checkpoint.get("arch") != arch:
        raise WeightMismatch(f"--arch {arch} does not fit {origin}, which is of {checkpoint.get('arch')}")
    weights = select_backbone_weights(checkpoint, "state_dict", origin)
    tensors = plain_names(weights.tensors)
    top_layer = {name: tensors.pop(name) for name in list(tensors) if name.startswith("top_layer.")}
    load_backbone_weights(network, dataclasses.replace(weights, tensors=tensors))
    return {name.removeprefix("top_layer."): value for name, value in top_layer.items()}


def load_network(path: str | Path, flag: str = "--model", keep_top_layer: bool = True) -> ClusterNetwork:
    """Rebuild the network of a checkpoint and fill it, entry by entry and in full; the number of entries is printed.

    The architecture is the checkpoint's ``arch``, the Sobel filter is there if its weights are, and the top layer has
    as many outputs as the file has biases for it. Checkpoints of ``main.py`` also say for which size of images the
    network was made; official ones are for 224 pixels.

    Args:
        path: Checkpoint of ``main.py`` or of the official code (``checkpoint.pth.tar``), or the name of a release:
            ``alexnet`` or ``vgg16``.
        flag: Name of the option in error messages.
        keep_top_layer: Whether to keep the top layer.

    Returns:
        The network in evaluation mode.

    Raises:
        ValueError: If there is no such file, it is no checkpoint of DeepCluster, or it does not fill the network.
    """
    if not Path(path).is_file():
        if str(path) not in RELEASES:
            raise ValueError(f"{flag} {path} is neither a file nor a release ({', '.join(RELEASES)})")
        path = fetch(str(path))
    checkpoint = safe_load(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("arch"), str):
        raise WeightMismatch(f"{flag} {path}: no checkpoint of DeepCluster (it has no 'arch')")
    weights = select_backbone_weights(checkpoint, "state_dict", str(path))
    tensors = plain_names(weights.tensors)
    if not keep_top_layer:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("top_layer.")}
    network = build_network(
        checkpoint["arch"],
        sobel="sobel.0.weight" in tensors,
        out=len(tensors["top_layer.bias"]) if "top_layer.bias" in tensors else None,
        img_size=dict(checkpoint.get("args") or {}).get("crop_size", OFFICIAL_CROP_SIZE),
        bn=any(name.endswith("running_mean") for name in tensors),
    )
    load_backbone_weights(network, dataclasses.replace(weights, tensors=tensors))
    return network.eval()
