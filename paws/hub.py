"""PAWS's released weights and images, and encoders filled with the files of its programs."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from shared.networks import pretrained
from shared.networks.card import Card, Release, positions_of
from shared.networks.weights import BackboneWeights, WeightMismatch, load_backbone_weights

from .encoder import build, build_encoder
from .heads import Encoder, classification_head


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


def release(percent: int, epochs: int, entry: str = "", top1: float = 0.0) -> Release:
    doc = f"PAWS with {percent} % of ImageNet's labels, {epochs} epochs: ResNet-50, 2048 dimensions"
    file = f"paws_imgnt_{percent}percent_{epochs}ep.pth.tar"
    return Release("resnet50", file, f"{doc} ({top1} fine-tuned)." if entry else "", entry)


CARD = Card(
    name="paws",
    build=build,
    releases={
        "paws_imgnt_10percent_300ep": release(10, 300, "paws_resnet50", 75.5),
        "paws_imgnt_10percent_200ep": release(10, 200),
        "paws_imgnt_10percent_100ep": release(10, 100),
        "paws_imgnt_1percent_300ep": release(1, 300, "paws_resnet50_1percent", 66.5),
        "paws_imgnt_1percent_200ep": release(1, 200),
        "paws_imgnt_1percent_100ep": release(1, 100),
    }
    | {
        name: Release("resnet50", f"{name}.pth.tar")
        for name in ("paws_imgnt_10percent_300ep_finetuned", "paws_imgnt_1percent_300ep_finetuned")
    },
    address="https://dl.fbaipublicfiles.com/suncet/",
    interpolation="bilinear",
    embedded_run="runs/materials/paws-latest.pth.tar",  # where main.py leaves the encoder of the embedded materials
    checkpoint_key="encoder",
    head_names=("fc", "pred"),
    sizes=sizes,
    arch_flag="--model_name",
)
MEAN, STD = CARD.mean, CARD.std
ENTRIES = pretrained.hub_entries(CARD)


def recipe_of(trained_with: Mapping, image_size: int | None):
    """The recipe (``--dataset``) that the flags of a training name."""
    from . import augmentations

    dataset, normalize = trained_with.get("dataset") or "imagenet", trained_with.get("normalize") is not False
    return augmentations.choose_recipe(dataset, normalize, image_size)


def eval_transform(image_size: int | None, network: nn.Module, trained_with: Mapping) -> Callable:
    """The centre crops of that recipe."""
    from . import evaluation

    return evaluation.eval_transform(recipe_of(trained_with, image_size), network)


# --- Encoders with the heads of a file --------------------------------------------------------------------------------


def read_weights(model_name: str, file: str | Path) -> BackboneWeights:
    """Backbone and heads of a training checkpoint (``encoder``), a fine-tuned network, a state dict, or a release."""
    weights = pretrained.read_weights(CARD, pretrained.find_file(CARD, model_name, file))
    sizes(model_name, weights.tensors)
    return weights


def build_for(model_name: str, weights: BackboneWeights, **heads) -> Encoder:
    """An encoder with the channels and sizes of a file's backbone."""
    return pretrained.build_for(CARD, model_name, weights.tensors, build_encoder, **heads)


def load_backbone_into(encoder: Encoder, model_name: str, file: str | Path, allow_partial: bool = False) -> None:
    """Fill the backbone; the heads stay as they are."""
    weights = read_weights(model_name, file)
    heads, encoder.fc, encoder.pred = (encoder.fc, encoder.pred), None, None
    try:
        load_backbone_weights(pretrained.backbone_of(encoder), weights, allow_partial=allow_partial)
    finally:
        encoder.fc, encoder.pred = heads


def load_encoder(model_name: str, file: str | Path, use_pred: bool = False) -> Encoder:
    """An encoder with the heads of a training, frozen: that for projection and, with ``use_pred``, for prediction."""
    weights = read_weights(model_name, file)
    if "fc.fc3.weight" not in weights.head:
        raise WeightMismatch(f"{weights.origin} holds no projection head (fc.fc3); a training checkpoint has one")
    has_pred = "pred.fc2.weight" in weights.head
    if use_pred and not has_pred:
        raise WeightMismatch(f"--use_pred: {weights.origin} holds no prediction head")
    output_dim = len(weights.head["fc.fc3.weight"])
    return pretrained.fill_with_heads(
        build_for(model_name, weights, output_dim=output_dim, use_pred_head=has_pred), weights
    )


def load_classifier(model_name: str, file: str | Path) -> Encoder:
    """A fine-tuned network, ours or an official one, whose ``fc`` gives one output per class."""
    weights = read_weights(model_name, file)
    if "fc.fc2.weight" not in weights.head or "fc.fc3.weight" in weights.head:
        raise WeightMismatch(f"{weights.origin} holds no fine-tuned network with a classifier")
    encoder = build_for(model_name, weights)
    encoder.fc = classification_head(encoder.embed_dim, len(weights.head["fc.fc2.weight"]))
    return pretrained.fill_with_heads(encoder, weights)
