"""Entry points of ``torch.hub``.

torch.hub.load("/path/to/this/repository", "dino_vits16", source="local") returns a backbone that maps normalised
images (B, 3, H, W) to features (B, D). The environment variable DINO_WEIGHTS_URL replaces the address of the weights.
"""

from torch import nn

from dino import pretrained as _pretrained
from dino import vision_transformer as _vision_transformer
from dino.networks import build_backbone as _build_backbone
from shared.weights import load_backbone_weights as _load_backbone_weights

dependencies = ["torch", "torchvision", "timm", "numpy", "safetensors"]


def _backbone(name: str, pretrained: bool, **kwargs) -> nn.Module:
    release = _pretrained.RELEASES[name]
    weights = _pretrained.fetch(release.backbone) if pretrained else None
    if release.arch.startswith("vit_"):
        backbone = getattr(_vision_transformer, release.arch)(patch_size=release.patch_size, **kwargs)
    else:
        backbone, _ = _build_backbone(release.arch, **kwargs)
    if weights is not None:
        _load_backbone_weights(backbone, weights)
    return backbone


def dino_vits16(pretrained: bool = True, **kwargs) -> nn.Module:
    """ViT-S/16, 384 dimensions (k-NN 74.5 on ImageNet)."""
    return _backbone("dino_vits16", pretrained, **kwargs)


def dino_vits8(pretrained: bool = True, **kwargs) -> nn.Module:
    """ViT-S/8, 384 dimensions (k-NN 78.3 on ImageNet)."""
    return _backbone("dino_vits8", pretrained, **kwargs)


def dino_vitb16(pretrained: bool = True, **kwargs) -> nn.Module:
    """ViT-B/16, 768 dimensions (k-NN 76.1 on ImageNet)."""
    return _backbone("dino_vitb16", pretrained, **kwargs)


def dino_vitb8(pretrained: bool = True, **kwargs) -> nn.Module:
    """ViT-B/8, 768 dimensions (k-NN 77.4 on ImageNet)."""
    return _backbone("dino_vitb8", pretrained, **kwargs)


def dino_resnet50(pretrained: bool = True, **kwargs) -> nn.Module:
    """ResNet-50, 2048 dimensions (k-NN 67.5 on ImageNet)."""
    return _backbone("dino_resnet50", pretrained, **kwargs)


def dino_xcit_small_12_p16(pretrained: bool = True, **kwargs) -> nn.Module:
    """XCiT-S12/16, 384 dimensions (k-NN 76.0 on ImageNet)."""
    return _backbone("dino_xcit_small_12_p16", pretrained, **kwargs)


def dino_xcit_small_12_p8(pretrained: bool = True, **kwargs) -> nn.Module:
    """XCiT-S12/8, 384 dimensions (k-NN 77.1 on ImageNet)."""
    return _backbone("dino_xcit_small_12_p8", pretrained, **kwargs)


def dino_xcit_medium_24_p16(pretrained: bool = True, **kwargs) -> nn.Module:
    """XCiT-M24/16, 512 dimensions (k-NN 76.4 on ImageNet)."""
    return _backbone("dino_xcit_medium_24_p16", pretrained, **kwargs)


def dino_xcit_medium_24_p8(pretrained: bool = True, **kwargs) -> nn.Module:
    """XCiT-M24/8, 512 dimensions (k-NN 77.9 on ImageNet)."""
    return _backbone("dino_xcit_medium_24_p8", pretrained, **kwargs)
