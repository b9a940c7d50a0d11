"""SwAV's networks: the ResNets of this folder, then torchvision's, then timm's, all with the same heads.

Their released weights (SwAV, DeepCluster-v2 and SeLa-v2) and their images.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from shared.networks import pretrained as networks
from shared.networks.backbones import build_library_backbone
from shared.networks.card import Card, Release, positions_of
from shared.networks.weights import WeightMismatch

from . import resnet50
from .resnet50 import LibraryNetwork, PrototypeNetwork

RESNETS = ("resnet50", "resnet50w2", "resnet50w4", "resnet50w5")
HEADS = ("output_dim", "hidden_mlp", "nmb_prototypes", "normalize")


# --- Networks ---------------------------------------------------------------------------------------------------------


def build_network(arch: str, img_size: int = 224, in_chans: int = 3, **options) -> PrototypeNetwork:
    """A randomly initialised network; without an ``output_dim`` it maps images to features (B, ``embed_dim``).

    Args:
        arch: ``resnet50``, ``resnet50w2``, ``resnet50w4``, ``resnet50w5``, or a model of torchvision or timm.
        img_size: Side in pixels of the images for which position embeddings are made; convnets have none.
        options: Of the heads, see :meth:`swav.resnet50.PrototypeNetwork.add_heads`, and of the trunk.
    """
    if arch in RESNETS:
        return getattr(resnet50, arch)(in_chans=in_chans, **options)
    heads = {name: options.pop(name) for name in HEADS if name in options}
    trunk, dim = build_library_backbone(arch, img_size=img_size, in_chans=in_chans, own_names=RESNETS, **options)
    return LibraryNetwork(trunk, dim, **heads)


# --- Card -------------------------------------------------------------------------------------------------------------


def sizes(arch: str, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The image size of a ViT; says what a file holds where it is something else, before a network is built in vain."""
    if {name.split(".")[0] for name in tensors} <= {"linear", "bn"}:
        raise WeightMismatch(
            "--pretrained holds a linear classifier without its network; give the network as --pretrained, and the "
            "classifier to eval_linear.py as --linear_weights"
        )
    stem = tensors.get("conv1.weight")
    if arch in RESNETS and stem is not None and "layer1.0.conv3.weight" in tensors:
        found = dict(zip((64, 128, 256, 320), RESNETS, strict=True)).get(len(stem), arch)
        if found != arch:
            raise WeightMismatch(f"--pretrained holds a network of the width of {found}, not of --arch {arch}")
    return positions_of(arch, tensors)


# The first of an architecture is what evaluations take without a file.
NAMES = (
    *("swav_800ep", "swav_400ep", "swav_200ep", "swav_100ep", "swav_400ep_bs256", "swav_200ep_bs256"),
    *("swav_400ep_2x224", "swav_RN50w2_400ep", "swav_RN50w4_400ep", "swav_RN50w5_400ep"),
    *("deepclusterv2_800ep", "deepclusterv2_400ep", "deepclusterv2_400ep_2x224", "selav2_400ep", "selav2_400ep_2x224"),
)
HUB = {  # entry of torch.hub, training, width, dimensions, linear top-1
    "swav_800ep": ("swav_resnet50", "SwAV, 800 epochs", "", 2048, 75.3),
    "swav_RN50w2_400ep": ("swav_resnet50w2", "SwAV, 400 epochs", " twice as wide", 4096, 77.3),
    "swav_RN50w4_400ep": ("swav_resnet50w4", "SwAV, 400 epochs", " four times as wide", 8192, 77.9),
    "swav_RN50w5_400ep": ("swav_resnet50w5", "SwAV, 400 epochs", " five times as wide", 10240, 78.5),
    "deepclusterv2_800ep": ("deepclusterv2_resnet50", "DeepCluster-v2, 800 epochs", "", 2048, 75.2),
    "selav2_400ep": ("selav2_resnet50", "SeLa-v2, 400 epochs", "", 2048, 71.8),
}


def release(name: str) -> Release:
    arch, file = "resnet50" + (re.search("RN50(w.)|$", name)[1] or ""), f"{name}_pretrain.pth.tar"
    if name not in HUB:
        return Release(arch, file)
    entry, training, width, dim, top1 = HUB[name]
    doc = f"{training}: ResNet-50{width}, {dim} dimensions (linear {top1} on ImageNet)."
    return Release(arch, file, doc, entry)


CARD = Card(
    name="swav",
    build=build_network,
    releases={name: release(name) for name in NAMES},
    address="https://dl.fbaipublicfiles.com/deepcluster/",
    interpolation="bilinear",
    std=(0.228, 0.224, 0.225),  # 0.228, not ImageNet's 0.229: the released weights were trained with it
    embedded_run="runs/materials/checkpoint.pth.tar",  # where main_swav.py leaves the network of the embedded data
    main="main_swav.py",
    checkpoint_key="state_dict",
    head_names=("projection_head", "prototypes"),
    sizes=sizes,
)
MEAN, STD = CARD.mean, CARD.std
ENTRIES = networks.hub_entries(CARD)
LINEAR_CLASSIFIER = "swav_800ep_eval_linear.pth.tar"  # of swav_800ep
fetch = functools.partial(networks.fetch, CARD)


# --- Files ------------------------------------------------------------------------------------------------------------


def load_backbone(arch: str, pretrained: str | Path = "", allow_partial: bool = False) -> PrototypeNetwork:
    """A network without heads, see :func:`shared.networks.pretrained.load_pretrained`."""
    return networks.load_pretrained(CARD, arch, pretrained, allow_partial=allow_partial)


def load_network(arch: str, pretrained: str | Path = "", allow_partial: bool = False) -> PrototypeNetwork:
    """A network with the projection head and the prototypes that the file has, as it was trained.

    Embeddings are normalised where there are prototypes.
    """
    if pretrained == "random":
        raise ValueError("--pretrained random: a file is needed here, for its heads")
    weights = networks.read_weights(CARD, networks.find_file(CARD, arch, pretrained))
    heads = head_options(weights.head)
    network = networks.build_for(CARD, arch, weights.tensors)
    network.add_heads(network.embed_dim, normalize="nmb_prototypes" in heads, **heads)
    return networks.fill_with_heads(network, weights, allow_partial)


def head_options(head: Mapping[str, Tensor]) -> dict:
    """Arguments of :func:`build_network` that make the heads of a file."""
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
