"""Released SwAV, DeepCluster-v2 and SeLa-v2 weights, and networks filled with them or with a file of any layout."""

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
    vit_shape,
)

from .networks import RESNETS, LibraryNetwork, build_network
from .resnet50 import PrototypeNetwork

BASE_URL = "https://dl.fbaipublicfiles.com/deepcluster/"
RUN_ON_DIGITS = "runs/digits/checkpoint.pth.tar"  # where main_swav.py leaves the network of the embedded data

# Name of a release and its architecture; the file is called <name>_pretrain.pth.tar. The first of an architecture is
# what evaluations take without a file.
RELEASES = {
    "swav_800ep": "resnet50",
    "swav_400ep": "resnet50",
    "swav_200ep": "resnet50",
    "swav_100ep": "resnet50",
    "swav_400ep_bs256": "resnet50",
    "swav_200ep_bs256": "resnet50",
    "swav_400ep_2x224": "resnet50",
    "swav_RN50w2_400ep": "resnet50w2",
    "swav_RN50w4_400ep": "resnet50w4",
    "swav_RN50w5_400ep": "resnet50w5",
    "deepclusterv2_800ep": "resnet50",
    "deepclusterv2_400ep": "resnet50",
    "deepclusterv2_400ep_2x224": "resnet50",
    "selav2_400ep": "resnet50",
    "selav2_400ep_2x224": "resnet50",
}
LINEAR_CLASSIFIER = "swav_800ep_eval_linear.pth.tar"  # of swav_800ep

HEADS = ("projection_head", "prototypes")


def fetch(file: str) -> Path:
    """Download a released file, unless it is there already, into torch hub's folder of checkpoints.

    Args:
        file: Name below the base address, which the environment variable ``SWAV_WEIGHTS_URL`` replaces.

    Raises:
        shared.networks.weights.DownloadError: If it cannot be had.
    """
    url = os.environ.get("SWAV_WEIGHTS_URL", BASE_URL).rstrip("/") + "/" + file
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.exists():
        distributed.print_once(f"downloading {url} to {path}")
        download(url, path)
    return path


def fetch_release(name: str) -> Path:
    return fetch(f"{name}_pretrain.pth.tar")


def find_file(arch: str, pretrained: str | Path) -> Path:
    """The file that ``--pretrained`` names: a path, a release, or ``""`` for the first release of the architecture.

    Raises:
        ValueError: If there is none, or the release is of another architecture.
    """
    if pretrained == "":
        pretrained = next((name for name, released in RELEASES.items() if released == arch), "")
        if pretrained == "":
            raise ValueError(f"no weights are released for --arch {arch}; give a file, or random, as --pretrained")
    if pretrained in RELEASES:
        if RELEASES[pretrained] != arch:
            raise ValueError(f"--pretrained {pretrained} is a {RELEASES[pretrained]}, not a {arch}: change --arch")
        return fetch_release(pretrained)
    if pretrained == RUN_ON_DIGITS and not Path(pretrained).is_file():
        raise ValueError(f"--pretrained {pretrained} is not there: run python main_swav.py first")
    if not Path(pretrained).is_file():
        raise ValueError(f"--pretrained {pretrained} is neither a file nor a release ({', '.join(RELEASES)})")
    return Path(pretrained)


def read_weights(path: str | Path) -> BackboneWeights:
    """Trunk and heads of a pre-training file (flat, ``module.`` names), a training checkpoint or a fine-tuned network.

    Raises:
        WeightMismatch: If the file holds something else, such as the classifier of ``eval_linear.py``.
    """
    weights = read_backbone_weights(path, head_names=HEADS)
    if {name.split(".")[0] for name in weights.tensors} <= {"linear", "bn"}:
        raise WeightMismatch(
            f"{path} holds a linear classifier without its network; give the network as --pretrained, and the "
            "classifier to eval_linear.py as --linear_weights"
        )
    return weights


def load_backbone(arch: str, pretrained: str | Path = "", allow_partial: bool = False) -> PrototypeNetwork:
    """Build a network without heads and fill its trunk, as the evaluation scripts do with their flags of these names.

    Channels, and the image size of a ViT's position embeddings, are taken from the file.

    Args:
        arch: See :func:`swav.networks.build_network`.
        pretrained: A file of any layout; the name of a release; ``""`` for the first release of the architecture;
            ``"random"`` for none.
        allow_partial: Load what matches when it is not everything.

    Returns:
        The network in evaluation mode, without gradients; maps images (B, C, H, W) to features (B, embed_dim).

    Raises:
        ValueError: If there are no released weights, no such file, or the file does not fill the network.
    """
    if pretrained == "random":
        return build_network(arch).eval().requires_grad_(False)
    weights = read_weights(find_file(arch, pretrained))
    check_width(arch, weights)
    network = build_for(arch, weights.tensors)
    load_backbone_weights(trunk_of(network), weights, allow_partial=allow_partial)
    return network.eval().requires_grad_(False)


def load_network(arch: str, pretrained: str | Path = "", allow_partial: bool = False) -> PrototypeNetwork:
    """Like :func:`load_backbone`, with the projection head and the prototypes that the file has.

    Embeddings are normalised where there are prototypes.
    """
    if pretrained == "random":
        raise ValueError("--pretrained random: a file is needed here, for its heads")
    weights = read_weights(find_file(arch, pretrained))
    check_width(arch, weights)
    heads = head_options(weights.head)
    network = build_for(arch, weights.tensors, normalize="nmb_prototypes" in heads, **heads)
    prefix = "backbone." if isinstance(network, LibraryNetwork) else ""
    tensors = {prefix + name: value for name, value in weights.tensors.items()} | weights.head
    load_backbone_weights(network, BackboneWeights(tensors, {}, weights.origin), allow_partial=allow_partial)
    return network.eval().requires_grad_(False)


def check_width(arch: str, weights: BackboneWeights) -> None:
    """Say which of our ResNets a file holds when it is another one, before a large network is built in vain."""
    stem = weights.tensors.get("conv1.weight")
    if arch in RESNETS and stem is not None and "layer1.0.conv3.weight" in weights.tensors:
        found = dict(zip((64, 128, 256, 320), RESNETS, strict=True)).get(len(stem), arch)
        if found != arch:
            raise WeightMismatch(f"{weights.origin} holds a network of the width of {found}, not of --arch {arch}")


def head_options(head: Mapping[str, Tensor]) -> dict:
    """Arguments of :func:`swav.networks.build_network` that make the heads of a file."""
    options = {}
    if "projection_head.weight" in head:
        options["output_dim"] = head["projection_head.weight"].shape[0]
    elif "projection_head.0.weight" in head and "projection_head.3.weight" in head:
        options["hidden_mlp"] = head["projection_head.0.weight"].shape[0]
        options["output_dim"] = head["projection_head.3.weight"].shape[0]
    sets = [name for name in head if re.fullmatch(r"prototypes\.prototypes\d+\.weight", name)]
    if sets:
        options["nmb_prototypes"] = [head[f"prototypes.prototypes{i}.weight"].shape[0] for i in range(len(sets))]
    elif "prototypes.weight" in head:
        options["nmb_prototypes"] = head["prototypes.weight"].shape[0]
    return options


def trunk_of(network: PrototypeNetwork) -> nn.Module:
    """The module whose names are those of a bare backbone: of torchvision, of timm, or the network itself."""
    return network.backbone if isinstance(network, LibraryNetwork) else network


def build_for(arch: str, tensors: Mapping[str, Tensor], **heads) -> PrototypeNetwork:
    """A network with the channels and the image size of a trunk's tensors."""
    shape = vit_shape(tensors)
    img_size = shape.img_size if shape is not None else 224
    network = build_network(arch, img_size=img_size, **heads)
    first = next(name for name, module in trunk_of(network).named_modules() if isinstance(module, nn.Conv2d))
    in_chans = tensors[f"{first}.weight"].shape[1] if f"{first}.weight" in tensors else 3
    return network if in_chans == 3 else build_network(arch, img_size=img_size, in_chans=in_chans, **heads)
