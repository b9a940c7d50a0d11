"""Entry points of ``torch.hub``.

torch.hub.load("/path/to/this/repository", "dino_vits16", source="local") returns a backbone that maps normalised
images (B, 3, H, W) to features (B, D). The environment variables DINO_WEIGHTS_URL, SWAV_WEIGHTS_URL, MSN_WEIGHTS_URL
and PAWS_WEIGHTS_URL replace the addresses of the weights.
"""

from torch import nn

from dino import pretrained as _pretrained
from dino import vision_transformer as _vision_transformer
from dino.networks import build_backbone as _build_backbone
from msn import pretrained as _msn_pretrained
from msn import vision_transformer as _msn_vision_transformer
from paws import pretrained as _paws_pretrained
from paws import resnet as _paws_resnet
from shared.weights import load_backbone_weights as _load_backbone_weights
from shared.weights import read_backbone_weights as _read_backbone_weights
from swav import pretrained as _swav_pretrained
from swav import resnet50 as _swav_resnets

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


def _swav(release: str, pretrained: bool, **kwargs) -> nn.Module:
    weights = _swav_pretrained.read_weights(_swav_pretrained.fetch_release(release)) if pretrained else None
    backbone = getattr(_swav_resnets, _swav_pretrained.RELEASES[release])(**kwargs)
    if weights is not None:
        _load_backbone_weights(backbone, weights)
    return backbone


def swav_resnet50(pretrained: bool = True, **kwargs) -> nn.Module:
    """SwAV, 800 epochs: ResNet-50, 2048 dimensions (linear 75.3 on ImageNet)."""
    return _swav("swav_800ep", pretrained, **kwargs)


def swav_resnet50w2(pretrained: bool = True, **kwargs) -> nn.Module:
    """SwAV, 400 epochs: ResNet-50 twice as wide, 4096 dimensions (linear 77.3 on ImageNet)."""
    return _swav("swav_RN50w2_400ep", pretrained, **kwargs)


def swav_resnet50w4(pretrained: bool = True, **kwargs) -> nn.Module:
    """SwAV, 400 epochs: ResNet-50 four times as wide, 8192 dimensions (linear 77.9 on ImageNet)."""
    return _swav("swav_RN50w4_400ep", pretrained, **kwargs)


def swav_resnet50w5(pretrained: bool = True, **kwargs) -> nn.Module:
    """SwAV, 400 epochs: ResNet-50 five times as wide, 10240 dimensions (linear 78.5 on ImageNet)."""
    return _swav("swav_RN50w5_400ep", pretrained, **kwargs)


def deepclusterv2_resnet50(pretrained: bool = True, **kwargs) -> nn.Module:
    """DeepCluster-v2, 800 epochs: ResNet-50, 2048 dimensions (linear 75.2 on ImageNet)."""
    return _swav("deepclusterv2_800ep", pretrained, **kwargs)


def selav2_resnet50(pretrained: bool = True, **kwargs) -> nn.Module:
    """SeLa-v2, 400 epochs: ResNet-50, 2048 dimensions (linear 71.8 on ImageNet)."""
    return _swav("selav2_400ep", pretrained, **kwargs)


def _msn(release: str, pretrained: bool, **kwargs) -> nn.Module:
    model_name, file = _msn_pretrained.RELEASES[release]
    path = _msn_pretrained.fetch(file) if pretrained else None
    encoder = _msn_vision_transformer.build(model_name, **kwargs)
    if path is not None:
        _load_backbone_weights(encoder, _read_backbone_weights(path, "target_encoder", head_names=("fc",)))
    return encoder


def msn_vits16(pretrained: bool = True, **kwargs) -> nn.Module:
    """MSN, 800 epochs: ViT-S/16, 384 dimensions (47.1 with one ImageNet image per class)."""
    return _msn("msn_vits16", pretrained, **kwargs)


def msn_vitb16(pretrained: bool = True, **kwargs) -> nn.Module:
    """MSN, 600 epochs: ViT-B/16, 768 dimensions (49.8 with one ImageNet image per class)."""
    return _msn("msn_vitb16", pretrained, **kwargs)


def msn_vitl16(pretrained: bool = True, **kwargs) -> nn.Module:
    """MSN, 600 epochs: ViT-L/16, 1024 dimensions."""
    return _msn("msn_vitl16", pretrained, **kwargs)


def msn_vitb4(pretrained: bool = True, **kwargs) -> nn.Module:
    """MSN, 300 epochs: ViT-B/4, 768 dimensions (54.3 with one ImageNet image per class)."""
    return _msn("msn_vitb4", pretrained, **kwargs)


def msn_vitl7(pretrained: bool = True, **kwargs) -> nn.Module:
    """MSN, 200 epochs: ViT-L/7, 1024 dimensions (57.1 with one ImageNet image per class)."""
    return _msn("msn_vitl7", pretrained, **kwargs)


def _paws(release: str, pretrained: bool, **kwargs) -> nn.Module:
    weights = _paws_pretrained.read_weights(_paws_pretrained.fetch(release)) if pretrained else None
    backbone = _paws_resnet.ResNet(**kwargs)
    if weights is not None:
        _load_backbone_weights(backbone, weights)
    return backbone


def paws_resnet50(pretrained: bool = True, **kwargs) -> nn.Module:
    """PAWS with 10 % of ImageNet's labels, 300 epochs: ResNet-50, 2048 dimensions (75.5 fine-tuned)."""
    return _paws("paws_imgnt_10percent_300ep", pretrained, **kwargs)


def paws_resnet50_1percent(pretrained: bool = True, **kwargs) -> nn.Module:
    """PAWS with 1 % of ImageNet's labels, 300 epochs: ResNet-50, 2048 dimensions (66.5 fine-tuned)."""
    return _paws("paws_imgnt_1percent_300ep", pretrained, **kwargs)
