"""Networks by name, and networks from checkpoint files, the official ones included."""

import difflib
import re
from pathlib import Path

import timm
import torchvision
from torch import Tensor, nn

from shared.weights import BackboneWeights, WeightMismatch, load_backbone_weights, safe_load, select_backbone_weights

from .networks import ClusterNetwork, alexnet, vgg16

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
    in_chans = 2 if sobel else 3
    if arch in torchvision.models.list_models(module=torchvision.models):
        backbone, dim = _build_torchvision(arch, img_size, in_chans)
    elif timm.is_model(arch):
        backbone, dim = _build_timm(arch, img_size, in_chans)
    else:
        names = [*PAPER, *torchvision.models.list_models(module=torchvision.models), *timm.list_models()]
        close = difflib.get_close_matches(arch, names, n=5)
        raise ValueError(
            f"--arch {arch} is unknown{'; did you mean ' + ', '.join(close) + '?' if close else '.'} "
            f"Known are {', '.join(PAPER)} and the models of torchvision and timm."
        )
    return ClusterNetwork(backbone, nn.Sequential(), dim, sobel, out)


def _build_torchvision(arch: str, img_size: int, in_chans: int) -> tuple[nn.Module, int]:
    options = {"image_size": img_size} if arch.startswith("vit_") else {}
    if arch in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    backbone = torchvision.models.get_model(arch, weights=None, **options)
    # the classifier is the last linear layer (a 1x1 convolution in SqueezeNet)
    name, last = [(n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    backbone.set_submodule(name, nn.Identity())
    if in_chans != 3:
        name, first = next((n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d))
        shape = (first.out_channels, first.kernel_size, first.stride, first.padding)
        backbone.set_submodule(name, nn.Conv2d(in_chans, *shape, bias=first.bias is not None))
    return backbone, last.in_features if isinstance(last, nn.Linear) else last.in_channels


def _build_timm(arch: str, img_size: int, in_chans: int) -> tuple[nn.Module, int]:
    try:
        backbone = timm.create_model(arch, num_classes=0, in_chans=in_chans, img_size=img_size)
    except TypeError as error:  # convnets take images of any size
        if "img_size" not in str(error):
            raise
        backbone = timm.create_model(arch, num_classes=0, in_chans=in_chans)
    return backbone, getattr(backbone, "head_hidden_size", backbone.num_features)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def official_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as in the official checkpoints, whose convolutional part is wrapped for several GPUs."""
    return {re.sub(r"^features\.", "features.module.", name): value for name, value in state_dict.items()}


def plain_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers for several GPUs add."""
    return {re.sub(r"(^|\.)module\.", r"\1", name): value for name, value in state_dict.items()}


def load_network(path: str | Path, flag: str = "--model", keep_top_layer: bool = True) -> ClusterNetwork:
    """Rebuild the network of a checkpoint and fill it; every entry must find its counterpart, and their number is
    printed.

    The architecture is the checkpoint's ``arch``, the Sobel filter is there if its weights are, and the top layer has
    as many outputs as the file has biases for it. Checkpoints of ``main.py`` also say for which size of images the
    network was made; official ones are for 224 pixels.

    Args:
        path: Checkpoint of ``main.py`` or of the official code (``checkpoint.pth.tar``).
        flag: Name of the option in error messages.
        keep_top_layer: Whether to keep the top layer.

    Returns:
        The network in evaluation mode.

    Raises:
        ValueError: If there is no such file, it is no checkpoint of DeepCluster, or it does not fill the network.
    """
    if not Path(path).is_file():
        raise ValueError(f"{flag} {path} is not a file")
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
    load_backbone_weights(network, BackboneWeights(tensors, 0, weights.origin))
    return network.eval()
