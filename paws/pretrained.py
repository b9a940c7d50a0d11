"""Released PAWS weights, and encoders filled with them or with a file of any layout."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from shared import distributed
from shared.networks.weights import (
    BackboneWeights,
    WeightMismatch,
    download,
    load_backbone_weights,
    read_backbone_weights,
)

from .heads import Encoder, classification_head
from .networks import LibraryEncoder, build_encoder

BASE_URL = "https://dl.fbaipublicfiles.com/suncet/"
RUN_ON_DIGITS = "runs/digits/paws-latest.pth.tar"  # where main.py leaves the encoder of the embedded digits
HEADS = ("fc", "pred")

# Names of the releases, all of a resnet50; the file is called <name>.pth.tar.
RELEASES = (
    "paws_imgnt_10percent_300ep",
    "paws_imgnt_10percent_200ep",
    "paws_imgnt_10percent_100ep",
    "paws_imgnt_1percent_300ep",
    "paws_imgnt_1percent_200ep",
    "paws_imgnt_1percent_100ep",
    "paws_imgnt_10percent_300ep_finetuned",
    "paws_imgnt_1percent_300ep_finetuned",
)


def fetch(release: str) -> Path:
    """Download a release, unless it is there already, into torch hub's folder of checkpoints.

    The environment variable ``PAWS_WEIGHTS_URL`` replaces the address.

    Raises:
        shared.networks.weights.DownloadError: If it cannot be had.
    """
    file = f"{release}.pth.tar"
    url = os.environ.get("PAWS_WEIGHTS_URL", BASE_URL).rstrip("/") + "/" + file
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.exists():
        distributed.print_once(f"downloading {url} to {path}")
        download(url, path)
    return path


def find_file(model_name: str, pretrained: str | Path) -> Path:
    """The file that ``--pretrained`` names: a path or a release.

    Raises:
        ValueError: If there is none, or the release is of another network.
    """
    if pretrained in RELEASES:
        if model_name != "resnet50":
            raise ValueError(f"--pretrained {pretrained} is a resnet50, not a {model_name}: change --model_name")
        return fetch(pretrained)
    if str(pretrained) == RUN_ON_DIGITS and not Path(pretrained).is_file():
        raise ValueError(f"--pretrained {pretrained} is not there: run python main.py first")
    if not Path(pretrained).is_file():
        raise ValueError(f"--pretrained {pretrained} is neither a file nor a release ({', '.join(RELEASES)})")
    return Path(pretrained)


def read_weights(path: str | Path) -> BackboneWeights:
    """Backbone and heads of a training checkpoint (``encoder``), a fine-tuned network, or a plain state dict."""
    return read_backbone_weights(path, checkpoint_key="encoder", head_names=HEADS)


def backbone_of(encoder: Encoder) -> nn.Module:
    """The module whose names are those of a bare backbone."""
    return encoder.backbone if isinstance(encoder, LibraryEncoder) else encoder


def load_backbone_into(encoder: Encoder, model_name: str, pretrained: str | Path, allow_partial: bool = False) -> None:
    """Fill the backbone; the heads stay as they are.

    Raises:
        ValueError: If there is no such file, or it does not fill the backbone and not ``allow_partial``.
    """
    weights = read_weights(find_file(model_name, pretrained))
    check_width(model_name, weights)
    heads, encoder.fc, encoder.pred = (encoder.fc, encoder.pred), None, None
    try:
        load_backbone_weights(backbone_of(encoder), weights, allow_partial=allow_partial)
    finally:
        encoder.fc, encoder.pred = heads


def load_encoder(
    model_name: str, pretrained: str | Path, use_pred: bool = False, heads: bool = True, allow_partial: bool = False
) -> Encoder:
    """Build an encoder with the heads of a file and fill it.

    Args:
        model_name: See :func:`paws.networks.build_encoder`.
        pretrained: A file of any layout, or the name of a release.
        use_pred: A prediction head is needed.
        heads: Without them only the backbone is built and filled.
        allow_partial: Load what matches when it is not everything.

    Returns:
        The encoder in evaluation mode, without gradients.

    Raises:
        ValueError: If there is no such file, it does not fill the encoder, or lacks a head.
    """
    weights = read_weights(find_file(model_name, pretrained))
    check_width(model_name, weights)
    options = head_options(weights, use_pred) if heads else {}
    encoder = build_for(model_name, weights.tensors, **options)
    if not heads:
        load_backbone_weights(backbone_of(encoder), weights, allow_partial=allow_partial)
        return encoder.eval().requires_grad_(False)
    load_backbone_weights(encoder, _all_entries(encoder, weights), allow_partial=allow_partial)
    return encoder.eval().requires_grad_(False)


def load_classifier(model_name: str, pretrained: str | Path) -> Encoder:
    """A fine-tuned network, ours or an official one, whose ``fc`` gives one output per class."""
    weights = read_weights(find_file(model_name, pretrained))
    if "fc.fc2.weight" not in weights.head or "fc.fc3.weight" in weights.head:
        raise WeightMismatch(f"{weights.origin} holds no fine-tuned network with a classifier")
    encoder = build_for(model_name, weights.tensors)
    encoder.fc = classification_head(encoder.embed_dim, len(weights.head["fc.fc2.weight"]))
    load_backbone_weights(encoder, _all_entries(encoder, weights))
    return encoder.eval().requires_grad_(False)


def _all_entries(encoder: Encoder, weights: BackboneWeights) -> BackboneWeights:
    """Backbone and heads together, under the names of the encoder."""
    prefix = "backbone." if isinstance(encoder, LibraryEncoder) else ""
    tensors = {prefix + name: value for name, value in weights.tensors.items()}
    return BackboneWeights(tensors | weights.head, {}, weights.origin)


def head_options(weights: BackboneWeights, use_pred: bool) -> dict:
    """Arguments of :func:`paws.networks.build_encoder` that make the heads of a file."""
    if "fc.fc3.weight" not in weights.head:
        raise WeightMismatch(f"{weights.origin} holds no projection head (fc.fc3); a training checkpoint has one")
    if use_pred and "pred.fc2.weight" not in weights.head:
        raise WeightMismatch(f"--use_pred: {weights.origin} holds no prediction head")
    return {
        "output_dim": len(weights.head["fc.fc3.weight"]),
        "use_pred_head": "pred.fc2.weight" in weights.head,
    }


def check_width(model_name: str, weights: BackboneWeights) -> None:
    """Say how wide the ResNet of a file is when it is another one, before a large network is built in vain."""
    stem = weights.tensors.get("conv1.weight")
    match = re.fullmatch(r"resnet\d+(?:w([1-9]))?", model_name)
    if match is None or stem is None or stem.shape[-1] != 7:
        return
    found, expected = len(stem), 64 * int(match[1] or 1)
    if found != expected:
        raise WeightMismatch(
            f"{weights.origin} holds a network with {found} channels in its first layer, --model_name {model_name} has "
            f"{expected}"
        )


def build_for(model_name: str, tensors: Mapping[str, Tensor], **heads) -> Encoder:
    """An encoder with the input channels of a backbone's tensors."""
    encoder = build_encoder(model_name, **heads)
    first = next(name for name, module in backbone_of(encoder).named_modules() if isinstance(module, nn.Conv2d))
    in_chans = tensors[f"{first}.weight"].shape[1] if f"{first}.weight" in tensors else 3
    return encoder if in_chans == 3 else build_encoder(model_name, in_chans=in_chans, **heads)
