"""PAWS's networks (those of this folder, then torchvision's and timm's), their released weights and images."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from shared.networks import pretrained
from shared.networks.backbones import build_library_backbone, first_convolution
from shared.networks.card import Card, Release, positions_of
from shared.networks.weights import BackboneWeights, WeightMismatch, load_backbone_weights

from .heads import Encoder, classification_head
from .resnet import BLOCKS, ResNet
from .wide_resnet import WideResNet

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
RUN_ON_DIGITS = "runs/digits/paws-latest.pth.tar"  # where main.py leaves the encoder of the embedded digits
NAMES = ("resnet50", "resnet50w2", "resnet50w4", "resnet101", "resnet152", "resnet200", "wide_resnet28w2")


# --- Networks ---------------------------------------------------------------------------------------------------------


class ResNetEncoder(Encoder, ResNet):
    def __init__(self, *args, output_dim: int = 0, use_pred_head: bool = False, **kwargs):
        ResNet.__init__(self, *args, **kwargs)
        self.add_heads(output_dim, use_pred_head)

    def forward_backbone(self, images: Tensor) -> Tensor:
        return ResNet.forward(self, images)


class WideResNetEncoder(Encoder, WideResNet):
    def __init__(self, *args, output_dim: int = 0, use_pred_head: bool = False, **kwargs):
        WideResNet.__init__(self, *args, **kwargs)
        self.add_heads(output_dim, use_pred_head)

    def forward_backbone(self, images: Tensor) -> Tensor:
        return WideResNet.forward(self, images)


class LibraryEncoder(Encoder):
    """A backbone of torchvision or timm, whose names begin with ``backbone.``."""

    def __init__(self, backbone: nn.Module, embed_dim: int, output_dim: int = 0, use_pred_head: bool = False):
        super().__init__()
        self.backbone = backbone
        self.embed_dim = embed_dim
        self.add_heads(output_dim, use_pred_head)

    def forward_backbone(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return features[0] if isinstance(features, tuple) else features  # XCiT returns a tuple in train mode


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
        output_dim, use_pred_head: See :meth:`paws.heads.Encoder.add_heads`.
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


# --- Card -------------------------------------------------------------------------------------------------------------


def sizes(model_name: str, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The image size of a ViT; of a ResNet of another width it is said before a large network is built in vain."""
    stem = tensors.get("conv1.weight")
    match = re.fullmatch(r"resnet\d+(?:w([1-9]))?", model_name)
    if match is not None and stem is not None and stem.shape[-1] == 7 and len(stem) != 64 * int(match[1] or 1):
        raise WeightMismatch(
            f"the file holds a network with {len(stem)} channels in its first layer, --model_name {model_name} has "
            f"{64 * int(match[1] or 1)}"
        )
    return positions_of(model_name, tensors)


def release(percent: int, epochs: int, suffix: str = "", entry: str = "", top1: float = 0.0) -> tuple[str, Release]:
    name = f"paws_imgnt_{percent}percent_{epochs}ep{suffix}"
    doc = f"PAWS with {percent} % of ImageNet's labels, {epochs} epochs: ResNet-50, 2048 dimensions"
    return name, Release("resnet50", f"{name}.pth.tar", f"{doc} ({top1} fine-tuned)." if entry else "", entry)


CARD = Card(
    name="paws",
    build=build,
    releases=dict(
        [
            release(10, 300, entry="paws_resnet50", top1=75.5),
            release(10, 200),
            release(10, 100),
            release(1, 300, entry="paws_resnet50_1percent", top1=66.5),
            release(1, 200),
            release(1, 100),
            release(10, 300, "_finetuned"),
            release(1, 300, "_finetuned"),
        ]
    ),
    address="https://dl.fbaipublicfiles.com/suncet/",
    mean=MEAN,
    std=STD,
    interpolation="bilinear",
    run_on_digits=RUN_ON_DIGITS,
    main="main.py",
    checkpoint_key="encoder",
    head_names=("fc", "pred"),
    sizes=sizes,
    arch_flag="--model_name",
)
ENTRIES = pretrained.hub_entries(CARD)


# --- Encoders with the heads of a file --------------------------------------------------------------------------------


def read_weights(model_name: str, file: str | Path) -> BackboneWeights:
    """Backbone and heads of a training checkpoint (``encoder``), a fine-tuned network, a state dict, or a release.

    Raises:
        ValueError: If there is no such file, or it holds a ResNet of another width.
    """
    weights = pretrained.read_weights(CARD, pretrained.find_file(CARD, model_name, file))
    sizes(model_name, weights.tensors)
    return weights


def build_for(model_name: str, weights: BackboneWeights, **heads) -> Encoder:
    """An encoder with the channels and sizes of a file's backbone."""
    heads |= sizes(model_name, weights.tensors)
    encoder = build_encoder(model_name, **heads)
    first, _ = first_convolution(backbone_of(encoder))
    in_chans = weights.tensors[f"{first}.weight"].shape[1] if f"{first}.weight" in weights.tensors else 3
    return encoder if in_chans == 3 else build_encoder(model_name, in_chans=in_chans, **heads)


def backbone_of(encoder: Encoder) -> nn.Module:
    """The module whose names are those of a bare backbone."""
    return encoder.backbone if isinstance(encoder, LibraryEncoder) else encoder


def load_backbone_into(encoder: Encoder, model_name: str, file: str | Path, allow_partial: bool = False) -> None:
    """Fill the backbone; the heads stay as they are.

    Raises:
        ValueError: If there is no such file, or it does not fill the backbone and not ``allow_partial``.
    """
    weights = read_weights(model_name, file)
    heads, encoder.fc, encoder.pred = (encoder.fc, encoder.pred), None, None
    try:
        load_backbone_weights(backbone_of(encoder), weights, allow_partial=allow_partial)
    finally:
        encoder.fc, encoder.pred = heads


def load_encoder(model_name: str, file: str | Path, use_pred: bool = False) -> Encoder:
    """An encoder with the projection head, and where there is one the prediction head, of a training.

    Args:
        use_pred: A prediction head is needed.

    Returns:
        The encoder in evaluation mode, without gradients.

    Raises:
        ValueError: If there is no such file, it does not fill the encoder, or lacks a head.
    """
    weights = read_weights(model_name, file)
    if "fc.fc3.weight" not in weights.head:
        raise WeightMismatch(f"{weights.origin} holds no projection head (fc.fc3); a training checkpoint has one")
    has_pred = "pred.fc2.weight" in weights.head
    if use_pred and not has_pred:
        raise WeightMismatch(f"--use_pred: {weights.origin} holds no prediction head")
    output_dim = len(weights.head["fc.fc3.weight"])
    return _filled(build_for(model_name, weights, output_dim=output_dim, use_pred_head=has_pred), weights)


def load_classifier(model_name: str, file: str | Path) -> Encoder:
    """A fine-tuned network, ours or an official one, whose ``fc`` gives one output per class."""
    weights = read_weights(model_name, file)
    if "fc.fc2.weight" not in weights.head or "fc.fc3.weight" in weights.head:
        raise WeightMismatch(f"{weights.origin} holds no fine-tuned network with a classifier")
    encoder = build_for(model_name, weights)
    encoder.fc = classification_head(encoder.embed_dim, len(weights.head["fc.fc2.weight"]))
    return _filled(encoder, weights)


def _filled(encoder: Encoder, weights: BackboneWeights) -> Encoder:
    """With backbone and heads, which a file names like the encoder."""
    prefix = "backbone." if isinstance(encoder, LibraryEncoder) else ""
    tensors = {prefix + name: value for name, value in weights.tensors.items()} | weights.head
    load_backbone_weights(encoder, BackboneWeights(tensors, {}, weights.origin))
    return encoder.eval().requires_grad_(False)
