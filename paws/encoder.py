"""PAWS's encoders by name: the networks of this folder, then torchvision's and timm's, all with the same heads."""

import re

from torch import Tensor, nn

from shared.networks.backbones import build_library_backbone

from .heads import Encoder
from .resnet import BLOCKS, ResNet
from .wide_resnet import WideResNet

NAMES = ("resnet50", "resnet50w2", "resnet50w4", "resnet101", "resnet152", "resnet200", "wide_resnet28w2")


class LibraryNetwork(nn.Module):
    """A backbone of torchvision or timm, whose names begin with ``backbone.``."""

    def __init__(self, backbone: nn.Module, embed_dim: int):
        super().__init__()
        self.backbone, self.embed_dim = backbone, embed_dim

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return features[0] if isinstance(features, tuple) else features  # XCiT returns a tuple in train mode


class ResNetEncoder(Encoder, ResNet):
    """A ResNet and its heads."""


class WideResNetEncoder(Encoder, WideResNet):
    """A wide ResNet and its heads."""


class LibraryEncoder(Encoder, LibraryNetwork):
    """A network of a library and its heads."""


def own_network(model_name: str) -> tuple[type[Encoder], type[nn.Module], tuple] | None:
    """Classes of the encoder and of its bare backbone and their arguments; None for a network of a library."""
    if match := re.fullmatch(r"resnet(50|101|151|152|200)(?:w([1-9]))?", model_name):
        blocks = BLOCKS[152 if match[1] == "151" else int(match[1])]
        return ResNetEncoder, ResNet, (blocks, int(match[2] or 1))
    if match := re.fullmatch(r"wide_resnet(\d{2,3})w(\d{1,2})", model_name):
        return WideResNetEncoder, WideResNet, (int(match[1]), int(match[2]))
    return None


def build_encoder(
    model_name: str, output_dim: int = 0, use_pred_head: bool = False, img_size: int = 224, in_chans: int = 3
) -> Encoder:
    """Build a randomly initialised encoder.

    Args:
        model_name: ``resnet50``, ``101``, ``152`` (in the official code ``151``), ``200``, with ``w2`` or ``w4`` for
            wider ones; ``wide_resnet28w2`` or another depth and width; else a model of torchvision or timm.
        output_dim, use_pred_head: See :class:`paws.heads.Encoder`.
        img_size: Side in pixels of the images for which position embeddings are made; convnets have none.
        in_chans: Channels of the images.

    Raises:
        ValueError: If the name is unknown.
    """
    heads = {"output_dim": output_dim, "use_pred_head": use_pred_head}
    if own := own_network(model_name):
        encoder, _, arguments = own
        return encoder(*arguments, in_chans, **heads)
    backbone, embed_dim = build_library_backbone(model_name, img_size=img_size, in_chans=in_chans, own_names=NAMES)
    return LibraryEncoder(backbone, embed_dim, **heads)


def build(model_name: str, in_chans: int = 3, img_size: int = 224, **options) -> nn.Module:
    """The backbone of :func:`build_encoder` by itself: images (B, C, H, W) to features (B, D)."""
    if own := own_network(model_name):
        _, backbone, arguments = own
        return backbone(*arguments, in_chans, **options)
    backbone, _ = build_library_backbone(model_name, img_size=img_size, in_chans=in_chans, own_names=NAMES, **options)
    return backbone
