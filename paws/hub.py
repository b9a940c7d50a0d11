"""Entries of torch.hub."""

from torch import nn

from shared.networks.weights import load_backbone_weights

from . import pretrained as released
from .resnet import ResNet


def entry(release: str, pretrained: bool, **options) -> nn.Module:
    weights = released.read_weights(released.fetch(release)) if pretrained else None
    backbone = ResNet(**options)
    if weights is not None:
        load_backbone_weights(backbone, weights)
    return backbone


def paws_resnet50(pretrained: bool = True, **kwargs) -> nn.Module:
    """PAWS with 10 % of ImageNet's labels, 300 epochs: ResNet-50, 2048 dimensions (75.5 fine-tuned)."""
    return entry("paws_imgnt_10percent_300ep", pretrained, **kwargs)


def paws_resnet50_1percent(pretrained: bool = True, **kwargs) -> nn.Module:
    """PAWS with 1 % of ImageNet's labels, 300 epochs: ResNet-50, 2048 dimensions (66.5 fine-tuned)."""
    return entry("paws_imgnt_1percent_300ep", pretrained, **kwargs)


ENTRIES = {function.__name__: function for function in (paws_resnet50, paws_resnet50_1percent)}
