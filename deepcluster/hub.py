"""Networks by name, their checkpoints and released weights, and the images that they see."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from shared.networks.backbones import build_library_backbone
from shared.networks.card import Card, Release
from shared.networks.pretrained import arch_of, hub_entries, image_size_of, known_arch, locate
from shared.networks.weights import WeightMismatch, load_backbone_weights, safe_load, select_backbone_weights

from .convnets import ClusterNetwork, alexnet, vgg16

PAPER = {"alexnet": alexnet, "vgg16": vgg16}
OFFICIAL_CROP_SIZE = 224


def build_network(
    arch: str,
    sobel: bool = False,
    out: int | None = None,
    img_size: int = OFFICIAL_CROP_SIZE,
    bn: bool = True,
    in_chans: int = 3,
) -> ClusterNetwork:
    """A randomly initialised network with a top layer of ``out`` outputs (None: without).

    Args:
        arch: ``alexnet``, ``vgg16`` (those of the paper), a classification model of torchvision, or a model of timm.
        sobel: Whether the network looks at Sobel gradients instead of colours.
        img_size: Side of the images in pixels.
        bn: Batch normalisation, in the two networks of the paper.
        in_chans: Channels of the images.
    """
    if arch in PAPER:
        return PAPER[arch](sobel, bn, out, img_size, in_chans)
    channels = 2 if sobel else in_chans
    backbone, dim = build_library_backbone(arch, img_size=img_size, in_chans=channels, own_names=tuple(PAPER))
    return ClusterNetwork(backbone, nn.Sequential(), dim, sobel, out, img_size, in_chans)


def sizes(arch: str, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The Sobel filter is there if its weights are, batch normalisation if there are its statistics."""
    bn = {"bn": any(name.endswith("running_mean") for name in tensors)} if arch in PAPER else {}
    sobel = "sobel.0.weight" in tensors
    images = tensors["sobel.0.weight"] if sobel else next((t for t in tensors.values() if t.dim() == 4), None)
    return {"sobel": sobel, **({} if images is None else {"in_chans": images.shape[1]}), **bn}


CARD = Card(
    name="deepcluster",
    build=build_network,
    releases={
        arch: Release(
            arch,
            f"{arch}/checkpoint.pth.tar",
            f"DeepCluster: {name} behind a Sobel filter, 4096 dimensions{result}.",
            entry=f"deepcluster_{arch}",
            options={"sobel": True},
            cached_as=f"deepcluster_{arch}.pth.tar",
        )
        for arch, name, result in (
            ("alexnet", "AlexNet", " (72.0 mAP on VOC 2007, fc6-8)"),
            ("vgg16", "VGG16", ""),
        )
    },
    address="https://dl.fbaipublicfiles.com/deepcluster/",
    interpolation="bilinear",
    embedded_run="runs/materials/checkpoint.pth.tar",  # where main.py leaves the network of the embedded data
    checkpoint_key="state_dict",
    head_names=("top_layer",),
    sizes=sizes,
    weights_flag="--model",
)
MEAN, STD = CARD.mean, CARD.std
ENTRIES = hub_entries(CARD)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def load_network(path: str | Path, keep_top_layer: bool = True) -> ClusterNetwork:
    """The network of a checkpoint, filled in full, in evaluation mode; the number of entries is printed.

    The architecture is the checkpoint's ``arch``, the Sobel filter is there if its weights are, and the top layer has
    as many outputs as the file has biases for it. Checkpoints of runs also say for which size of images the network was
    made; official ones are for 224 pixels.

    Args:
        path: Checkpoint of ``main.py``, of another folder's run or of the official code, the folder of a run, or the
            name of a release: ``alexnet`` or ``vgg16``.
        keep_top_layer: Without it the network gives features.
    """
    checkpoint = safe_load(locate(CARD, path))
    weights = select_backbone_weights(checkpoint, CARD.checkpoint_key, str(path), CARD.head_names)
    arch = arch_of(weights.flags)
    if arch is None:
        raise WeightMismatch(f"--model {path}: no checkpoint of DeepCluster (it has no 'arch'), nor of another run")
    if keep_top_layer:
        weights.tensors, weights.head = weights.tensors | weights.head, {}
    arch = known_arch(CARD, arch, weights.tensors)
    network = build_network(
        arch,
        **sizes(arch, weights.tensors),
        out=len(weights.tensors["top_layer.bias"]) if "top_layer.bias" in weights.tensors else None,
        img_size=image_size_of(weights.flags) or OFFICIAL_CROP_SIZE,
    )
    load_backbone_weights(network, weights)
    return network.eval()
