"""DINO's networks (the ViTs of this folder, then torchvision's and timm's), their released weights and images."""

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from shared.networks import pretrained
from shared.networks.backbones import build_library_backbone
from shared.networks.card import Card, Release
from shared.networks.weights import vit_shape

from . import vision_transformer

VITS = ("vit_micro", "vit_tiny", "vit_small", "vit_base")
VIT_NAMES = (*VITS, *(name.replace("vit", "deit") for name in VITS))


# --- Networks ---------------------------------------------------------------------------------------------------------


def build_backbone(
    arch: str, patch_size: int = 16, drop_path_rate: float = 0.0, img_size: int = 224, in_chans: int = 3, **options
) -> tuple[nn.Module, int]:
    """Build a randomly initialised network that maps images (B, C, H, W) to features (B, D).

    A name known to torchvision and timm alike (``resnet50``) gives torchvision's network, as in the official code.
    XCiT comes from timm; the published names work without its input size (``xcit_small_12_p16``).

    Args:
        arch: ``vit_tiny``, ``vit_small``, ``vit_base`` (or ``deit_*``, the same networks), a classification model of
            torchvision, or a model of timm.
        patch_size: Side of a patch in pixels, ViTs of this folder only; elsewhere it is part of the name.
        drop_path_rate: Stochastic depth of the deepest block, in [0, 1).
        img_size: Side in pixels of the images for which position embeddings are made; ``[side]`` as in the official
            code.
        options: Others of :class:`dino.vision_transformer.VisionTransformer`.

    Returns:
        The network, whose classifier is ``nn.Identity``, and the embedding dimension D.
    """
    side = img_size if isinstance(img_size, int) else img_size[0]
    if arch not in VIT_NAMES:
        return build_library_backbone(arch, drop_path_rate, side, in_chans, own_names=VIT_NAMES, **options)
    if not 1 <= patch_size <= side:
        raise ValueError(f"--patch_size {patch_size} must be between 1 and the image side of {side} pixels")
    if unseen := side % patch_size:
        warnings.warn(
            f"{arch}: --patch_size {patch_size} does not divide {side}; the last {unseen} rows and columns of pixels "
            "are not seen",
            stacklevel=2,
        )
    build_vit = getattr(vision_transformer, plain_name(arch))
    backbone = build_vit(patch_size, img_size=side, in_chans=in_chans, drop_path_rate=drop_path_rate, **options)
    return backbone, backbone.embed_dim


def plain_name(arch: str) -> str:
    """``vit_small`` for ``deit_small``, the same network."""
    return arch.replace("deit", "vit") if arch in VIT_NAMES else arch


# --- Card -------------------------------------------------------------------------------------------------------------


def build(arch: str, **options) -> nn.Module:
    """:func:`build_backbone` with D as the attribute ``feature_dim``."""
    backbone, backbone.feature_dim = build_backbone(arch, **options)
    return backbone


def sizes(arch: str, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Image and patch size of a ViT; in networks of libraries the patch size is part of the name."""
    shape = vit_shape(tensors)
    if shape is None:
        return {}
    return {"img_size": shape.img_size} | ({"patch_size": shape.patch_size} if arch in VIT_NAMES else {})


def release(arch: str, stem: str, doc: str, **options: int) -> Release:
    return Release(arch, f"{stem}_pretrain/{stem}_pretrain.pth", f"{doc} on ImageNet).", options=options)


CARD = Card(
    name="dino",
    build=build,
    releases={
        "dino_vits16": release("vit_small", "dino_deitsmall16", "ViT-S/16, 384 dimensions (k-NN 74.5", patch_size=16),
        "dino_vits8": release("vit_small", "dino_deitsmall8", "ViT-S/8, 384 dimensions (k-NN 78.3", patch_size=8),
        "dino_vitb16": release("vit_base", "dino_vitbase16", "ViT-B/16, 768 dimensions (k-NN 76.1", patch_size=16),
        "dino_vitb8": release("vit_base", "dino_vitbase8", "ViT-B/8, 768 dimensions (k-NN 77.4", patch_size=8),
    }
    | {
        f"dino_{arch}": release(arch, f"dino_{arch}", doc)
        for arch, doc in {
            "resnet50": "ResNet-50, 2048 dimensions (k-NN 67.5",
            "xcit_small_12_p16": "XCiT-S12/16, 384 dimensions (k-NN 76.0",
            "xcit_small_12_p8": "XCiT-S12/8, 384 dimensions (k-NN 77.1",
            "xcit_medium_24_p16": "XCiT-M24/16, 512 dimensions (k-NN 76.4",
            "xcit_medium_24_p8": "XCiT-M24/8, 512 dimensions (k-NN 77.9",
        }.items()
    },
    address="https://dl.fbaipublicfiles.com/dino/",
    interpolation="bicubic",
    main="main_dino.py",
    sizes=sizes,
    weights_flag="--pretrained_weights",
)
MEAN, STD = CARD.mean, CARD.std
ENTRIES = pretrained.hub_entries(CARD)

# for attention maps, and for retrieval
VITS8_300_EPOCHS = "dino_deitsmall8_300ep_pretrain/dino_deitsmall8_300ep_pretrain.pth"
VITS16_LANDMARKS = "dino_vitsmall16_googlelandmark_pretrain/dino_vitsmall16_googlelandmark_pretrain.pth"
fetch = functools.partial(pretrained.fetch, CARD)


def fetch_linear_weights(arch: str, patch_size: int) -> Path:
    """The released linear classifier of an architecture; ``ValueError`` if there is none."""
    name = pretrained.find_release(CARD, plain_name(arch), patch_size=patch_size)
    if name is None:
        raise ValueError(
            f"no linear weights are released for --arch {arch} --patch_size {patch_size}; "
            "give a file as --linear_weights"
        )
    return fetch(CARD.releases[name].file.replace("_pretrain.pth", "_linearweights.pth"))


def load_pretrained(
    arch: str,
    patch_size: int,
    pretrained_weights: str | Path = "",
    checkpoint_key: str = CARD.checkpoint_key,
    allow_partial: bool = False,
) -> tuple[nn.Module, int]:
    """:func:`shared.networks.pretrained.load_pretrained` with the flags of these names; the network and D."""
    backbone = pretrained.load_pretrained(
        CARD, plain_name(arch), pretrained_weights, checkpoint_key, allow_partial, patch_size=patch_size
    )
    return backbone, backbone.feature_dim


# flags that a checkpoint must share with the run that goes on with it
NETWORK_FLAGS = tuple(
    "arch patch_size global_crop_size in_chans out_dim use_bn_in_head norm_last_layer optimizer".split()
)


def to_official(state: dict) -> dict:
    """The state of a run under the names of the official checkpoints, whose networks are wrapped for processes."""
    has_batchnorm = any(name.endswith("running_mean") for name in state["teacher"])  # else their teacher is not wrapped
    prefixes = {"student": "module.", "teacher": "module." if has_batchnorm else ""}
    return state | {
        network: {prefix + name: value for name, value in state[network].items()}
        for network, prefix in prefixes.items()
    }
