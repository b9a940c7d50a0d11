"""Entry points of ``torch.hub``.

torch.hub.load("/path/to/this/repository", "dino_vits16", source="local") returns a backbone that maps normalised
images (B, 3, H, W) to features (B, D). The environment variables DINO_WEIGHTS_URL and SWAV_WEIGHTS_URL replace the
addresses of the weights.
"""

from torch import nn

from dino import pretrained as _pretrained
from dino import vision_transformer as _vision_transformer
from dino.networks import build_backbone as _build_backbone
from shared.weights import load_backbone_weights as _load_backbone_weights
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


def _contriever(name: str, pretrained: bool, name_or_path: str | None):
    from contriever.encoder import load_retriever  # needs the packages of `pip install -e '.[contriever]'`

    if not pretrained:
        return load_retriever(name_or_path, random_init=True)
    return load_retriever(name_or_path or name, allow_download=name_or_path is None)


def contriever(pretrained: bool = True, name_or_path: str | None = None):
    """Contriever without labels, BERT-base (nDCG@10 37.7 on 13 BEIR sets): ``.encode(texts)`` gives (N, 768).

    Args:
        pretrained: False: random weights, the shape of ``name_or_path`` or, without it, of the packaged small encoder.
        name_or_path: Another encoder or checkpoint; the released one is fetched from the Hugging Face hub without it.
    """
    return _contriever("facebook/contriever", pretrained, name_or_path)


def contriever_msmarco(pretrained: bool = True, name_or_path: str | None = None):
    """Contriever fine-tuned on MS MARCO (nDCG@10 46.6 on 14 BEIR sets); arguments as of :func:`contriever`."""
    return _contriever("facebook/contriever-msmarco", pretrained, name_or_path)


def mcontriever(pretrained: bool = True, name_or_path: str | None = None):
    """mContriever without labels, multilingual BERT-base; arguments as of :func:`contriever`."""
    return _contriever("facebook/mcontriever", pretrained, name_or_path)


def mcontriever_msmarco(pretrained: bool = True, name_or_path: str | None = None):
    """mContriever fine-tuned on MS MARCO; arguments as of :func:`contriever`."""
    return _contriever("facebook/mcontriever-msmarco", pretrained, name_or_path)
