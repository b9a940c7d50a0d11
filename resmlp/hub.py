"""ResMLP's networks (the published ones, then timm's and torchvision's), their released weights and images."""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from shared import distributed
from shared.networks import pretrained as networks
from shared.networks.card import Card, Release
from shared.networks.classifiers import build_library_classifier, fill_classifier, num_classes_of
from shared.networks.names import renamed
from shared.networks.weights import WeightMismatch

from .resmlp_models import ARCHITECTURES, ResMLP, resize_cross_patch_layers

TIMM_NAMES = {"patch_embed": "stem", "attn": "linear_tokens", "mlp": "mlp_channels", "gamma_": "ls"}


def build_network(name: str, num_classes: int, img_size: int = 224, **options) -> nn.Module:
    """A randomly initialised network that maps images (B, C, H, W) to logits (B, num_classes).

    Args:
        name: A published ResMLP (``resmlp_24``), or, to compare with, a model of timm or of torchvision.
        img_size: Side of the images in pixels, for networks whose weights depend on it.
        options: ``in_chans``, ``drop_rate`` and ``drop_path_rate``; ``patch_size``, ``embed_dim`` and ``depth`` of a
            ResMLP or of a ViT of timm, None: the published one.
    """
    if name not in ARCHITECTURES:
        return build_library_classifier(name, num_classes, own_names=list(ARCHITECTURES), img_size=img_size, **options)
    options = {option: value for option, value in options.items() if value is not None}
    return ARCHITECTURES[name](img_size=img_size, num_classes=num_classes, **options)


def build_backbone(arch: str, **options) -> ResMLP:
    """A published network without its classifier."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"{arch} is none of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch](**{"num_classes": 0} | options)


# --- Weights ----------------------------------------------------------------------------------------------------------


def sizes(arch: str, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Arguments of :class:`ResMLP` that its tensors tell; ``WeightMismatch`` for those of another network."""
    patches, mixing = tensors.get("patch_embed.proj.weight"), tensors.get("blocks.0.attn.weight")
    if patches is None or mixing is None or patches.dim() != 4 or math.isqrt(len(mixing)) ** 2 != len(mixing):
        raise WeightMismatch(f"{arch} holds no ResMLP")
    embed_dim, _, patch_size, _ = patches.shape
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    img_size = math.isqrt(len(mixing)) * patch_size
    return {"img_size": img_size, "patch_size": patch_size, "embed_dim": embed_dim, "depth": len(blocks)}


def from_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with timm's names for ResMLP in the published ones; any other one stays as it is."""
    if "stem.proj.weight" not in tensors:
        return dict(tensors)
    ours = renamed(tensors, {rf"(^|\.){theirs}": rf"\1{ours}" for ours, theirs in TIMM_NAMES.items()})
    return {name: value.flatten() if name.endswith((".alpha", ".beta")) else value for name, value in ours.items()}


def to_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`from_timm`; timm's affine layers have the shape (1, 1, D)."""
    theirs = renamed(tensors, {rf"(^|\.){ours}": rf"\1{theirs}" for ours, theirs in TIMM_NAMES.items()})
    return {
        name: value.reshape(1, 1, -1) if name.endswith((".alpha", ".beta")) else value for name, value in theirs.items()
    }


CARD = Card(
    name="resmlp",
    build=build_backbone,
    releases={
        f"{arch}_{variant}": Release(arch, f"{arch}_{variant}.pth")
        for arch, variants in {
            "resmlp_12": ("no_dist", "dist", "dino"),
            "resmlp_24": ("no_dist", "dist", "dino"),
            "resmlp_36": ("no_dist", "dist"),
            "resmlpB_24": ("no_dist", "dist", "22k"),
        }.items()
        for variant in variants
    },
    address="https://dl.fbaipublicfiles.com/deit/",
    interpolation="bicubic",
    checkpoint_key="model",
    sizes=sizes,
    rename=from_timm,
    arch_flag="--model",
    weights_flag="--pretrained_weights",
)
MEAN, STD = CARD.mean, CARD.std
read_weights = partial(networks.read_tensors, CARD)  # of a release, a file of any layout or an address


def eval_transform(image_size: int | None, network: ResMLP, trained_with: Mapping) -> Callable:
    """The centre crops of the evaluations, of the size that the network was made for."""
    from shared.supervised import transforms

    in_chans = network.patch_embed.proj.in_channels
    return transforms.eval_transform(network.img_size, MEAN, STD, in_chans=in_chans)


def fill(network: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> bool:
    """:func:`fill_classifier`; a ResMLP for images of another size takes the cross-patch layers interpolated."""
    if isinstance(network, ResMLP) and "blocks.0.attn.weight" in tensors:
        grid = math.isqrt(len(tensors["blocks.0.attn.weight"]))
        if grid != network.grid:
            distributed.print_once(
                f"{origin}: cross-patch layers for {grid}x{grid} patches, interpolated to {network.grid}x{network.grid}"
            )
            tensors = resize_cross_patch_layers(tensors, network.grid)
    return fill_classifier(network, tensors, origin)


def load_network(
    pretrained: str | Path = "",
    key: str = CARD.checkpoint_key,
    img_size: int | None = None,
    classifier: bool = False,
) -> ResMLP:
    """A ResMLP of the shape that its weights have, filled, in evaluation mode and without gradients.

    Args:
        pretrained: A release (``resmlp_24_dist``), a file of any layout or an address.
        img_size: Side of the images in pixels; None: that of the weights, else the cross-patch layers are interpolated.
        classifier: Whether to keep the classifier; without it the network maps images to features.
    """
    tensors = read_weights(pretrained, key)
    shape = sizes(str(pretrained), tensors)
    if img_size is not None:
        shape["img_size"] = img_size
    num_classes = num_classes_of(tensors) if classifier else 0
    network = ResMLP(in_chans=tensors["patch_embed.proj.weight"].shape[1], num_classes=num_classes, **shape)
    fill(network, tensors, str(pretrained))
    return network.eval().requires_grad_(False)


# --- torch.hub --------------------------------------------------------------------------------------------------------

DOCS = {
    "resmlp_12": "ResMLP-S12 (76.6 on ImageNet; ``dist``: distilled, 77.8; ``dino``: self-supervised, k-NN 62.6).",
    "resmlp_24": "ResMLP-S24 (79.4 on ImageNet; ``dist``: distilled, 80.8; ``dino``: self-supervised, k-NN 69.4).",
    "resmlp_36": "ResMLP-S36 (79.7 on ImageNet; ``dist``: distilled, 81.1).",
    "resmlpB_24": "ResMLP-B24/8 (``dist``: distilled, 83.6; ``in_22k``: first trained on ImageNet-22k, 84.4).",
}


def entry(arch: str) -> Callable[..., nn.Module]:
    """The function of torch.hub for a published network, with its classifier."""

    def build(pretrained: bool | str = True, dist: bool = False, dino: bool = False, in_22k: bool = False, **options):
        if not pretrained:
            return ARCHITECTURES[arch](**options)
        name = f"{arch}_{'dist' if dist else 'dino' if dino else '22k' if in_22k else 'no_dist'}"
        name = name if pretrained is True else str(pretrained)  # a run or a file of one's own
        tensors = read_weights(name)
        shape = {"num_classes": num_classes_of(tensors)}
        if name not in CARD.releases:
            shape |= sizes(name, tensors) | {"in_chans": tensors["patch_embed.proj.weight"].shape[1]}
        network = ARCHITECTURES[arch](**shape | options)
        fill(network, tensors, name)
        return network

    build.__name__ = build.__qualname__ = arch
    build.__doc__ = DOCS[arch]
    return build


ENTRIES = {arch: entry(arch) for arch in DOCS}
