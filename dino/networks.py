"""Backbones by name: the ViTs of this folder, then torchvision, then timm. None of it needs a network."""

import warnings

from torch import nn

from shared.networks.backbones import build_library_backbone, library_architectures

from . import vision_transformer

VITS = ("vit_tiny", "vit_small", "vit_base")
VIT_NAMES = (*VITS, *(name.replace("vit", "deit") for name in VITS))


def available_architectures() -> list[str]:
    """Every name that :func:`build_backbone` accepts, our ViTs first."""
    return [*VIT_NAMES, *sorted(library_architectures() - set(VIT_NAMES))]


def build_backbone(
    arch: str, patch_size: int = 16, drop_path_rate: float = 0.0, img_size: int = 224, in_chans: int = 3
) -> tuple[nn.Module, int]:
    """Build a randomly initialised network that maps images (B, C, H, W) to features (B, D).

    A name known to torchvision and timm alike (``resnet50``) gives torchvision's network, as in the official code.
    XCiT comes from timm; the published names work without its input size (``xcit_small_12_p16``).

    Args:
        arch: ``vit_tiny``, ``vit_small``, ``vit_base`` (or ``deit_*``, the same networks), a classification model of
            torchvision, or a model of timm.
        patch_size: Side of a patch in pixels, ViTs of this folder only; elsewhere it is part of the name.
        drop_path_rate: Stochastic depth of the deepest block, in [0, 1).
        img_size: Side in pixels of the images for which position embeddings are made.
        in_chans: Channels of the input images.

    Returns:
        The network, whose classifier is ``nn.Identity``, and the embedding dimension D.

    Raises:
        ValueError: If the name is unknown or a patch is larger than the image.
    """
    if arch in VIT_NAMES:
        _check_patches(arch, patch_size, img_size)
        backbone = getattr(vision_transformer, arch.replace("deit", "vit"))(
            img_size=[img_size], patch_size=patch_size, in_chans=in_chans, drop_path_rate=drop_path_rate
        )
        return backbone, backbone.embed_dim
    return build_library_backbone(arch, drop_path_rate, img_size, in_chans, own_names=VIT_NAMES)


def _check_patches(arch: str, patch_size: int, img_size: int) -> None:
    if not 1 <= patch_size <= img_size:
        raise ValueError(f"--patch_size {patch_size} must be between 1 and the image side of {img_size} pixels")
    if img_size % patch_size:
        warnings.warn(
            f"{arch}: --patch_size {patch_size} does not divide {img_size}; the last {img_size % patch_size} rows and "
            "columns of pixels are not seen",
            stacklevel=3,
        )
