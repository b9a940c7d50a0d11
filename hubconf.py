"""Entry points of ``torch.hub``.

torch.hub.load("/path/to/this/repository", "dino_vits16", source="local") returns a backbone that maps normalised
images (B, 3, H, W) to features (B, D); the entries of ResMLP and XCiT return a classifier. The environment variables
DINO_WEIGHTS_URL, SWAV_WEIGHTS_URL, ... (the folder's name in capitals) replace the addresses of the weights.
"""

from torch import nn

from deepcluster import backbones as _deepcluster_networks
from deepcluster import pretrained as _deepcluster_pretrained
from dino import pretrained as _pretrained
from dino import vision_transformer as _vision_transformer
from dino.networks import build_backbone as _build_backbone
from msn import pretrained as _msn_pretrained
from msn import vision_transformer as _msn_vision_transformer
from paws import pretrained as _paws_pretrained
from paws import resnet as _paws_resnet
from resmlp import pretrained as _resmlp_pretrained
from resmlp import resmlp_models as _resmlp_models
from shared.networks.weights import load_backbone_weights as _load_backbone_weights
from shared.networks.weights import read_backbone_weights as _read_backbone_weights
from shared.networks.weights import safe_load as _safe_load
from swav import pretrained as _swav_pretrained
from swav import resnet50 as _swav_resnets
from xcit import pretrained as _xcit_pretrained
from xcit.cross_covariance_transformer import build_xcit as _build_xcit

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


def _deepcluster(arch: str, pretrained: bool, **kwargs) -> nn.Module:
    path = _deepcluster_pretrained.fetch(arch) if pretrained else None
    network = _deepcluster_networks.build_network(arch, **{"sobel": True} | kwargs)
    if path is not None:
        _deepcluster_networks.fill_network(network, _safe_load(path), arch, str(path))
    return network


def deepcluster_alexnet(pretrained: bool = True, **kwargs) -> nn.Module:
    """DeepCluster: AlexNet behind a Sobel filter, 4096 dimensions (72.0 mAP on VOC 2007, fc6-8)."""
    return _deepcluster("alexnet", pretrained, **kwargs)


def deepcluster_vgg16(pretrained: bool = True, **kwargs) -> nn.Module:
    """DeepCluster: VGG16 behind a Sobel filter, 4096 dimensions."""
    return _deepcluster("vgg16", pretrained, **kwargs)


def _resmlp(arch: str, variant: str, pretrained: bool, **kwargs) -> nn.Module:
    build = _resmlp_models.ARCHITECTURES[arch]
    if not pretrained:
        return build(**kwargs)
    release = f"{arch}_{variant}"
    tensors = _resmlp_pretrained.read_weights(release)
    network = build(**{"num_classes": _resmlp_pretrained.shape_of(tensors, release)["num_classes"], **kwargs})
    _resmlp_pretrained.fill(network, tensors, release)
    return network


def resmlp_12(pretrained: bool = True, dist: bool = False, dino: bool = False, **kwargs) -> nn.Module:
    """ResMLP-S12 (76.6 on ImageNet; ``dist``: distilled, 77.8; ``dino``: self-supervised, k-NN 62.6)."""
    return _resmlp("resmlp_12", "dist" if dist else "dino" if dino else "no_dist", pretrained, **kwargs)


def resmlp_24(pretrained: bool = True, dist: bool = False, dino: bool = False, **kwargs) -> nn.Module:
    """ResMLP-S24 (79.4 on ImageNet; ``dist``: distilled, 80.8; ``dino``: self-supervised, k-NN 69.4)."""
    return _resmlp("resmlp_24", "dist" if dist else "dino" if dino else "no_dist", pretrained, **kwargs)


def resmlp_36(pretrained: bool = True, dist: bool = False, **kwargs) -> nn.Module:
    """ResMLP-S36 (79.7 on ImageNet; ``dist``: distilled, 81.1)."""
    return _resmlp("resmlp_36", "dist" if dist else "no_dist", pretrained, **kwargs)


def resmlpB_24(pretrained: bool = True, dist: bool = False, in_22k: bool = False, **kwargs) -> nn.Module:
    """ResMLP-B24/8 (``dist``: distilled, 83.6 on ImageNet; ``in_22k``: first trained on ImageNet-22k, 84.4)."""
    return _resmlp("resmlpB_24", "dist" if dist else "22k" if in_22k else "no_dist", pretrained, **kwargs)


def _xcit(name: str, pretrained: bool, variant: str, **kwargs) -> nn.Module:
    network = _build_xcit(name, **kwargs)
    if pretrained:
        release = f"{name}_{variant}"
        _xcit_pretrained.fill(network, _xcit_pretrained.read_weights(release), release)
    return network


def xcit_nano_12_p16(pretrained: bool = True, variant: str = "224", **kwargs) -> nn.Module:
    """XCiT-N12/16; top-1 of the variants 224 / 224_dist / 384_dist: 69.9 / 72.2 / 75.4."""
    return _xcit("xcit_nano_12_p16", pretrained, variant, **kwargs)


def xcit_nano_12_p8(pretrained: bool = True, variant: str = "224", **kwargs) -> nn.Module:
    """XCiT-N12/8; top-1 of the variants 224 / 224_dist / 384_dist: 73.8 / 76.3 / 77.8."""
    return _xcit("xcit_nano_12_p8", pretrained, variant, **kwargs)


def xcit_tiny_12_p16(pretrained: bool = True, variant: str = "224", **kwargs) -> nn.Module:
    """XCiT-T12/16; top-1 of the variants 224 / 224_dist / 384_dist: 77.1 / 78.6 / 80.9."""
    return _xcit("xcit_tiny_12_p16", pretrained, variant, **kwargs)


def xcit_tiny_12_p8(pretrained: bool = True, variant: str = "224", **kwargs) -> nn.Module:
    """XCiT-T12/8; top-1 of the variants 224 / 224_dist / 384_dist: 79.7 / 81.2 / 82.4."""
    return _xcit("xcit_tiny_12_p8", pretrained, variant, **kwargs)


def xcit_tiny_24_p16(pretrained: bool = True, variant: str = "224", **kwargs) -> nn.Module:
    """XCiT-T24/16; top-1 of the variants 224 / 224_dist / 384_dist: 79.4 / 80.4 / 82.6."""
    return _xcit("xcit_tiny_24_p16", pretrained, variant, **kwargs)


def xcit_tiny_24_p8(pretrained: bool = True, variant: str = "224", **kwargs) -> nn.Module:
    """XCiT-T24/8; top-1 of the variants 224 / 224_dist / 384_dist: 81.9 / 82.6 / 83.7."""
    return _xcit("xcit_tiny_24_p8", pretrained, variant, **kwargs)


def xcit_small_12_p16(pretrained: bool = True, variant: str = "224", **kwargs) -> nn.Module:
    """XCiT-S12/16; top-1 of the variants 224 / 224_dist / 384_dist: 82.0 / 83.3 / 84.7."""
    return _xcit("xcit_small_12_p16", pretrained, variant, **kwargs)


def xcit_small_12_p8(pretrained: bool = True, variant: str = "224", **kwargs) -> nn.Module:
    """XCiT-S12/8; top-1 of the variants 224 / 224_dist / 384_dist: 83.4 / 84.2 / 85.1."""
    return _xcit("xcit_small_12_p8", pretrained, variant, **kwargs)


def xcit_small_24_p16(pretrained: bool = True, variant: str = "224", **kwargs) -> nn.Module:
    """XCiT-S24/16; top-1 of the variants 224 / 224_dist / 384_dist: 82.6 / 83.9 / 85.1."""
    return _xcit("xcit_small_24_p16", pretrained, variant, **kwargs)


def xcit_small_24_p8(pretrained: bool = True, variant: str = "224", **kwargs) -> nn.Module:
    """XCiT-S24/8; top-1 of the variants 224 / 224_dist / 384_dist: 83.9 / 84.9 / 85.6."""
    return _xcit("xcit_small_24_p8", pretrained, variant, **kwargs)


def xcit_medium_24_p16(pretrained: bool = True, variant: str = "224", **kwargs) -> nn.Module:
    """XCiT-M24/16; top-1 of the variants 224 / 224_dist / 384_dist: 82.7 / 84.3 / 85.4."""
    return _xcit("xcit_medium_24_p16", pretrained, variant, **kwargs)


def xcit_medium_24_p8(pretrained: bool = True, variant: str = "224", **kwargs) -> nn.Module:
    """XCiT-M24/8; top-1 of the variants 224 / 224_dist / 384_dist: 83.7 / 85.1 / 85.8."""
    return _xcit("xcit_medium_24_p8", pretrained, variant, **kwargs)


def xcit_large_24_p16(pretrained: bool = True, variant: str = "224", **kwargs) -> nn.Module:
    """XCiT-L24/16; top-1 of the variants 224 / 224_dist / 384_dist: 82.9 / 84.9 / 85.8."""
    return _xcit("xcit_large_24_p16", pretrained, variant, **kwargs)


def xcit_large_24_p8(pretrained: bool = True, variant: str = "224", **kwargs) -> nn.Module:
    """XCiT-L24/8; top-1 of the variants 224 / 224_dist / 384_dist: 84.4 / 85.4 / 86.0."""
    return _xcit("xcit_large_24_p8", pretrained, variant, **kwargs)


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
