"""The network by name, files that fill it, and training checkpoints in the official layout."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from shared import distributed
from shared.networks.card import Card, Release
from shared.networks.classifiers import load_completely
from shared.networks.pretrained import flags_of_run, hub_entries, image_size_of, locate, read_tensors, read_weights
from shared.networks.weights import WeightMismatch

from .vgg16 import OFFICIAL_SIZE, STAGES, VGG16, sobel_filter

ARCH = "deepercluster_vgg16"  # other folders have a vgg16 of other shapes
NETWORK_FLAGS = ("sobel", "width", "image_size", "in_chans", "super_classes", "rotnet", "k")  # of a run, for good
MODULE = "module."  # before the names of the official files


def build(arch: str = ARCH, in_chans: int = 3, img_size: int = OFFICIAL_SIZE, **options) -> VGG16:
    """A randomly initialised network; ``options`` are those of :class:`VGG16`."""
    if arch != ARCH:
        raise ValueError(f"--arch {arch} is unknown; known is {ARCH}")
    return VGG16(in_chans=in_chans, img_size=img_size, **options)


def sizes(arch: str, tensors: Mapping[str, Tensor]) -> dict:
    """Arguments of :class:`VGG16` that its tensors tell; ``WeightMismatch`` for those of another network."""
    first, linear = tensors.get("body.features.0.weight"), tensors.get("body.classifier.0.weight")
    if first is None or linear is None or first.dim() != 4 or linear.dim() != 2:
        missing = "body.features.0 or body.classifier.0 is missing"
        raise WeightMismatch(f"{arch}: no VGG16 of DeeperCluster or DeepCluster: {missing}")
    sobel = "sobel.0.weight" in tensors
    return {
        "sobel": sobel,
        "folded": first.shape[2] == 5,
        "width": len(first),
        "last_side": math.isqrt(linear.shape[1] // (STAGES[-1][0] * len(first))),
        "in_chans": tensors["sobel.0.weight"].shape[1] if sobel else first.shape[1],
    }


def rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a VGG16 of any layout under the names of :class:`VGG16`.

    Understood are checkpoints of ``main.py`` and ``eval_pretrain.py``, official ones, files of the body alone, and
    those of DeepCluster. The first convolution tells whether there is a Sobel filter.
    """
    names = {name: f"body.{body_name(name)}" for name in tensors}
    found = {new: tensors[name] for name, new in names.items() if not new.startswith("body.sobel.")}
    first = found.get("body.features.0.weight")
    if first is None:
        return dict(tensors)
    if first.shape[1] == 2:
        in_chans = next((t.shape[1] for name, t in tensors.items() if name.endswith("sobel.0.weight")), 3)
        found |= {f"sobel.{name}": value for name, value in sobel_filter(in_chans).state_dict().items()}
    return found


def body_name(name: str) -> str:
    """The name inside of the body of what an official file, of this paper or of DeepCluster, calls a tensor."""
    return re.sub(r"(^|\.)module\.", r"\1", name).removeprefix("body.")


FILES = {
    "ours": "ours/ours.pth",
    "deepcluster_flickr": "deepcluster/deepcluster_flickr.pth",
    "rotnet_flickr": "rotnet/rotnet_flickr.pth",
    "rotnet_imagenet": "rotnet/rotnet_imagenet.pth",
    "deepcluster_vgg16": "vgg16/checkpoint.pth.tar",
}
PREFIX = "deepercluster_"  # of entries and downloaded files
DOC = "VGG16 of {}: images of 224 pixels to the 4096 features that are clustered."
CARD = Card(
    name="deepercluster",
    build=build,
    releases={
        name: Release(ARCH, file, DOC.format(file), f"{PREFIX}{name}", {"sobel": True}, f"{PREFIX}{name}.pth")
        for name, file in FILES.items()
    },
    address="https://dl.fbaipublicfiles.com/deepcluster/",
    interpolation="bilinear",
    embedded_run="runs/materials/checkpoint.pth.tar",
    checkpoint_key="state_dict",
    head_names=("pred_layer", "top_layer"),
    sizes=sizes,
    rename=rename,
)
MEAN, STD = CARD.mean, CARD.std


def load_network(path: str | Path, relu: bool = False, classifier: bool = False) -> VGG16:
    """The filled network of a file, a run or a release, in evaluation mode.

    Args:
        relu: See :class:`VGG16`.
        classifier: With its ``pred_layer``.
    """
    file, origin = locate(CARD, path), f"{CARD.weights_flag} {path}"
    weights, size = read_weights(CARD, file), image_size_of(flags_of_run(file))
    layer = {name: value for name, value in weights.head.items() if classifier and name.startswith("pred_layer.")}
    if classifier and not layer:
        raise WeightMismatch(f"{origin} has no classifier (pred_layer)")
    shape, tensors = sizes(origin, weights.tensors), weights.tensors | layer
    number = len(layer["pred_layer.bias"]) if classifier else 0
    network = VGG16(relu=relu, num_classes=number, img_size=size or 2 ** len(STAGES) * shape["last_side"], **shape)
    load_completely(network, tensors, origin)
    distributed.print_once(f"{origin}: {len(tensors)} entries loaded")
    return network.eval()


def fill_body(network: VGG16, path: str | Path) -> None:
    """Start a network from the weights of a file; where they are those of another one, the error names the flag."""
    origin, tensors = f"{CARD.weights_flag} {path}", read_tensors(CARD, path)
    found, own = sizes(origin, tensors), sizes(ARCH, network.state_dict())
    told = {name: f"--{name}: {{}}, not {{}}" for name in ("width", "sobel", "in_chans")}
    told["last_side"] = "--image_size: maps of {0} x {0}, not {1} x {1}"
    for name, values in told.items():
        if found[name] != own[name]:
            raise WeightMismatch(f"{origin} is of a network with another {values.format(found[name], own[name])}")
    load_completely(network, tensors, origin)


ENTRIES = hub_entries(CARD, load_network)


# --- Training checkpoints ---------------------------------------------------------------------------------------------


def to_official(state: dict) -> dict:
    """The state of a run under the names of the official ``checkpoint.pth.tar``; sub-classes stay in the same file."""
    weights = {MODULE + name: value for name, value in state.pop("network").items()}
    clustering = state.pop("clustering")
    return state | clustering | {"state_dict": weights, "start_iter": state["step_in_epoch"]}


CLUSTERING = "images clustered_epoch evaluated_before clusters pred_layer_state_dict optimizer_pred_layer sub_classes"


def from_official(checkpoint: dict) -> dict:
    """The way back.

    Official files have neither flags nor clusters. These are in pickled files beside them, which are not read, and so
    are found anew; without them the official files of the sub-classes' scores are of no use.
    """
    if "state_dict" not in checkpoint:
        raise ValueError("checkpoint.pth.tar in --output_dir is none of DeeperCluster: it has no 'state_dict'")
    network = {name.removeprefix(MODULE): value for name, value in checkpoint["state_dict"].items()}
    state = checkpoint | {"network": network}
    if "clusters" not in checkpoint:
        names = {name.removeprefix(MODULE): v for name, v in (checkpoint.get("pred_layer_state_dict") or {}).items()}
        state |= {"step_in_epoch": checkpoint.get("start_iter", 0), "pred_layer_state_dict": names}
        state |= {"clusters": None, "evaluated_before": True, "clustered_epoch": -1}
        distributed.print_once("an official checkpoint: clusters are found anew")
    return state | {"clustering": {name: state[name] for name in CLUSTERING.split() if name in state}}
