"""XCiT's networks (the published ones, then timm's and torchvision's), their released weights and images."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.networks.card import Card, Release
from shared.networks.classifiers import build_library_classifier, fill_classifier
from shared.networks.pretrained import fetch_release
from shared.networks.weights import fetch_file, safe_load, select_backbone_weights

from .cross_covariance_transformer import ARCHITECTURES, XCiT, build_xcit

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CROP_RATIO = 0.875  # of the centre crop and the resized short side; 1 for the published numbers (--full_crop)
TOP1 = {  # of the variants 224 / 224_dist / 384_dist: resolution of the (last) training; distilled or not
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
VARIANTS = ("224", "224_dist", "384_dist")


def build_network(name: str, num_classes: int, img_size: int | None = None, **options) -> nn.Module:
    """A randomly initialised network that maps images (B, C, H, W) to logits (B, num_classes).

    Args:
        name: A published XCiT (``xcit_small_12_p16``), or, to compare with, a model of timm or of torchvision.
        img_size: Side of the images in pixels, for timm's networks whose weights depend on it.
        options: ``in_chans``, ``drop_rate`` and ``drop_path_rate``.

    Raises:
        ValueError: If the name is unknown.
    """
    if name in ARCHITECTURES:
        return build_xcit(name, num_classes=num_classes, **options)
    return build_library_classifier(name, num_classes, own_names=ARCHITECTURES, img_size=img_size, **options)


def build_backbone(arch: str, **options) -> XCiT:
    """A published network without its classifier."""
    return build_xcit(arch, **{"num_classes": 0} | options)


# --- Weights ----------------------------------------------------------------------------------------------------------


CARD = Card(
    name="xcit",
    build=build_backbone,
    releases={
        f"{arch}_{variant}": Release(arch, f"{arch}_{variant}.pth") for arch in ARCHITECTURES for variant in VARIANTS
    }
    | {  # backbones without a head, trained with DINO
        f"xcit_{size}_p{patch_size}_dino": Release(f"xcit_{size}_p{patch_size}", f"xcit_{size}_cp{patch_size}_dino.pth")
        for size in ("small_12", "medium_24")
        for patch_size in (16, 8)
    },
    address="https://dl.fbaipublicfiles.com/xcit/",
    mean=MEAN,
    std=STD,
    interpolation="bicubic",
    run_on_digits="runs/digits/checkpoint.pth",
    main="main.py",
    checkpoint_key="model",
    arch_flag="--model",
)


def read_weights(
    pretrained: str | Path, key: str = CARD.checkpoint_key, flag: str = CARD.weights_flag
) -> dict[str, Tensor]:
    """Tensors of a release, a file or an address, under the published names.

    Args:
        key: The network to take from a training checkpoint.
        flag: Where ``pretrained`` was given, for messages.

    Raises:
        ValueError: If there is no such file, or it holds no network.
    """
    name = str(pretrained)
    file = fetch_release(CARD, name) if name in CARD.releases else fetch_file(name, flag)
    return from_timm(select_backbone_weights(safe_load(file), key, name).tensors)


def from_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with timm's names for XCiT in the published ones; any other one stays as it is."""
    if "pos_embed.token_projection.weight" not in tensors:
        return dict(tensors)
    renamed = {}
    for name, value in tensors.items():
        if match := re.fullmatch(r"(cls_attn_blocks\.\d+\.attn\.)[qkv]\.(weight|bias)", name):
            # timm has three layers where the published networks have one
            parts = [tensors[f"{match[1]}{part}.{match[2]}"] for part in "qkv"]
            renamed[f"{match[1]}qkv.{match[2]}"] = torch.cat(parts)
        else:
            renamed[name.replace("pos_embed.", "pos_embeder.")] = value
    return renamed


def to_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the published names in timm's."""
    renamed = {}
    for name, value in tensors.items():
        if match := re.fullmatch(r"(cls_attn_blocks\.\d+\.attn\.)qkv\.(weight|bias)", name):
            renamed |= {f"{match[1]}{part}.{match[2]}": t for part, t in zip("qkv", value.chunk(3), strict=True)}
        else:
            renamed[name.replace("pos_embeder.", "pos_embed.")] = value
    return renamed


def load_network(model: str, pretrained: str | Path = "", key: str = CARD.checkpoint_key) -> XCiT:
    """A published network, filled, in evaluation mode.

    Classes and channels are those of the file; a file without a classifier gives a network without one, which maps
    images to features.

    Args:
        model: A name of ``ARCHITECTURES``.
        pretrained: A release, a file of any layout or an address; ``""``: the release at 224 pixels without
            distillation.
        key: The network to take from a training checkpoint.
    """
    pretrained = pretrained or f"{model}_224"
    tensors = read_weights(pretrained, key)
    in_chans = tensors["patch_embed.proj.0.0.weight"].shape[1] if "patch_embed.proj.0.0.weight" in tensors else 3
    num_classes = tensors["head.weight"].shape[0] if "head.weight" in tensors else 0
    network = build_xcit(model, num_classes=num_classes, in_chans=in_chans)
    fill_classifier(network, tensors, str(pretrained))
    return network.eval()


def entry(name: str) -> Callable[..., nn.Module]:
    """The function of torch.hub for a published network, with its classifier."""

    def build(pretrained: bool = True, variant: str = "224", **kwargs) -> nn.Module:
        network = build_xcit(name, **kwargs)
        if pretrained:
            fill_classifier(network, read_weights(f"{name}_{variant}"), f"{name}_{variant}")
        return network

    size, top1 = TOP1[name]
    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"XCiT-{size}; top-1 of the variants 224 / 224_dist / 384_dist: {top1}."
    return build


ENTRIES = {name: entry(name) for name in TOP1}
