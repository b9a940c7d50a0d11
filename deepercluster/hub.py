"""The network by name, files that fill it, and training checkpoints in the official layout."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from shared import distributed
from shared.networks.card import Card, Release
from shared.networks.classifiers import load_completely
from shared.networks.pretrained import image_size_of, locate
from shared.networks.weights import (
    WeightMismatch,
    flags_of_training,
    safe_load,
    select_backbone_weights,
)

from .vgg16 import OFFICIAL_SIZE, STAGES, VGG16

ARCH = "deepercluster_vgg16"  # other folders have a vgg16 of other shapes
NETWORK_FLAGS = ("sobel", "width", "image_size", "in_chans", "super_classes", "rotnet", "k")  # of a run, for good
MODULE = "module."  # before the names of the official files


def build(arch: str = ARCH, in_chans: int = 3, img_size: int = OFFICIAL_SIZE, **options) -> VGG16:
    """A randomly initialised network; ``options`` are those of :class:`VGG16`.

    Raises:
        ValueError: If there is no such architecture.
    """
    if arch != ARCH:
        raise ValueError(f"--arch {arch} is unknown; known is {ARCH}")
    return VGG16(in_chans=in_chans, img_size=img_size, **options)


def sizes(arch: str, tensors: Mapping[str, Tensor]) -> dict:
    """Arguments of :class:`VGG16` that its tensors tell.

    Raises:
        WeightMismatch: If they are not those of one.
    """
    first, linear = tensors.get("body.features.0.weight"), tensors.get("body.classifier.0.weight")
    if first is None or linear is None or first.dim() != 4 or linear.dim() != 2:
        raise WeightMismatch(f"{arch}: no VGG16 of DeeperCluster: body.features.0 or body.classifier.0 is missing")
    width, folded = first.shape[0], first.shape[2] == 5
    sobel = "sobel.0.weight" in tensors
    return {
        "sobel": sobel,
        "folded": folded,
        "width": width,
        "last_side": math.isqrt(linear.shape[1] // (STAGES[-1][0] * width)),
        "in_chans": tensors["sobel.0.weight"].shape[1] if sobel else first.shape[1],
    }


CARD = Card(
    name="deepercluster",
    build=build,
    releases={
        name: Release(ARCH, file, options={"sobel": sobel}, cached_as=f"deepercluster_{name}.pth")
        for name, file, sobel in (
            ("ours", "ours/ours.pth", True),
            ("deepcluster_flickr", "deepcluster/deepcluster_flickr.pth", True),
            ("rotnet_flickr", "rotnet/rotnet_flickr.pth", True),
            ("rotnet_imagenet", "rotnet/rotnet_imagenet.pth", True),
            ("deepcluster_vgg16", "vgg16/checkpoint.pth.tar", True),
        )
    },
    address="https://dl.fbaipublicfiles.com/deepcluster/",
    interpolation="bilinear",
    embedded_run="runs/materials/checkpoint.pth.tar",
    main="main.py",
    checkpoint_key="state_dict",
    head_names=("pred_layer", "top_layer"),
    sizes=sizes,
)
MEAN, STD = CARD.mean, CARD.std


def entry(name: str) -> Callable[..., VGG16]:
    release = CARD.releases[name]

    def load(pretrained: bool | str = True, **options) -> VGG16:
        if pretrained:
            return load_network(name if pretrained is True else pretrained, **options)  # or a run of one's own
        return build(release.arch, **{**release.options, **options})

    load.__name__ = load.__qualname__ = f"deepercluster_{name}"
    load.__doc__ = f"VGG16 of {release.file}: images of 224 pixels to the 4096 features that are clustered."
    return load


ENTRIES = {f"deepercluster_{name}": entry(name) for name in CARD.releases}


# --- Networks of files ------------------------------------------------------------------------------------------------


def body_name(name: str) -> str:
    """The name inside of the body of what an official file, of this paper or of DeepCluster, calls a tensor."""
    return re.sub(r"(^|\.)module\.", r"\1", name).removeprefix("body.")


def read_tensors(path: str | Path, flag: str = CARD.weights_flag) -> tuple[dict[str, Tensor], Mapping]:
    """Tensors of a file under the names of :class:`VGG16`, with ``pred_layer`` if there is one; flags of its training.

    Understood are checkpoints of ``main.py`` and ``eval_pretrain.py``, official ones, files of the body alone, and
    those of DeepCluster, whose ``top_layer`` is left out. The first convolution tells whether there is a Sobel filter.

    Raises:
        WeightMismatch: If there is no VGG16 in it.
    """
    checkpoint = safe_load(locate(CARD, path, flag))
    weights = select_backbone_weights(checkpoint, CARD.checkpoint_key, f"{flag} {path}", CARD.head_names)
    tensors = {}
    for name, value in weights.tensors.items():
        name = body_name(name)
        if not name.startswith("sobel."):
            tensors[f"body.{name}"] = value
    first = tensors.get("body.features.0.weight")
    if first is None:
        raise WeightMismatch(f"{flag} {path}: no VGG16 of DeeperCluster or DeepCluster, it has no features.0.weight")
    if first.shape[1] == 2:
        in_chans = next((t.shape[1] for name, t in weights.tensors.items() if name.endswith("sobel.0.weight")), 3)
        sobel = VGG16(sobel=True, width=1, img_size=32, in_chans=in_chans).sobel
        tensors |= {f"sobel.{name}": value for name, value in sobel.state_dict().items()}
    head = {name: value for name, value in weights.head.items() if name.startswith("pred_layer.")}
    return tensors | head, flags_of_training(checkpoint)


def load_network(
    path: str | Path, relu: bool = False, classifier: bool = False, flag: str = CARD.weights_flag
) -> VGG16:
    """The filled network of a file, in evaluation mode.

    Args:
        relu: See :class:`VGG16`.
        classifier: With its ``pred_layer``.

    Raises:
        ValueError: If the file does not fill one.
    """
    tensors, trained_with = read_tensors(path, flag)
    found, size = sizes(f"{flag} {path}", tensors), image_size_of(trained_with)
    number = len(tensors.get("pred_layer.bias", ())) if classifier else 0
    if classifier and not number:
        raise WeightMismatch(f"{flag} {path} has no classifier (pred_layer)")
    size = size or 2 ** len(STAGES) * found["last_side"]
    network = VGG16(relu=relu, num_classes=number, img_size=size, **found)
    if not number:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("pred_layer.")}
    load_completely(network, tensors, f"{flag} {path}")
    distributed.print_once(f"{flag} {path}: {len(tensors)} entries loaded")
    return network.eval()


def fill_body(network: VGG16, path: str | Path, flag: str = CARD.weights_flag) -> None:
    """Start a network from the weights of a file.

    Raises:
        ValueError: If they are those of another network; the message names what differs.
    """
    tensors, _ = read_tensors(path, flag)
    found, own = sizes(f"{flag} {path}", tensors), sizes(ARCH, network.state_dict())
    for name, its_flag in (
        ("width", "width"),
        ("last_side", "image_size"),
        ("sobel", "sobel"),
        ("in_chans", "in_chans"),
    ):
        if found[name] != own[name]:
            what = f"maps of {found[name]} x {found[name]}, not {own[name]} x {own[name]}"
            what = what if name == "last_side" else f"{found[name]}, not {own[name]}"
            raise WeightMismatch(f"{flag} {path} is of a network with another --{its_flag}: {what}")
    tensors = {name: value for name, value in tensors.items() if not name.startswith("pred_layer.")}
    kept = {name: value for name, value in network.state_dict().items() if name.startswith("pred_layer.")}
    load_completely(network, tensors | kept, f"{flag} {path}")


# --- Training checkpoints ---------------------------------------------------------------------------------------------


def to_official(state: dict) -> dict:
    """The state of a run under the names of the official ``checkpoint.pth.tar``; sub-classes stay in the same file."""
    weights = {MODULE + name: value for name, value in state.pop("network").items()}
    clustering = state.pop("clustering")
    return state | clustering | {"state_dict": weights, "start_iter": state["step_in_epoch"]}


CLUSTERING = "images clustered_epoch evaluated_before clusters pred_layer_state_dict optimizer_pred_layer sub_classes"


def from_official(checkpoint: dict, folder: Path, super_classes: int, num_sub: int) -> dict:
    """The way back; official files have neither flags nor clusters.

    Those of the sub-classes are beside it. They are checked, but of no use: their clusters are in pickled files, which
    are not read, and so are found anew.

    Raises:
        ValueError: If a file is of something else.
    """
    if "state_dict" not in checkpoint:
        raise ValueError(f"{folder} holds no checkpoint of DeeperCluster: it has no 'state_dict'")
    network = {name.removeprefix(MODULE): value for name, value in checkpoint["state_dict"].items()}
    state = checkpoint | {"network": network}
    if "clusters" not in checkpoint:
        names = {name.removeprefix(MODULE): v for name, v in (checkpoint.get("pred_layer_state_dict") or {}).items()}
        state |= {"step_in_epoch": checkpoint.get("start_iter", 0), "pred_layer_state_dict": names}
        state |= {"clusters": None, "evaluated_before": True, "clustered_epoch": -1}
        read = read_sub_classes(folder, super_classes, num_sub)
        distributed.print_once(f"an official checkpoint with {len(read)} files of sub-classes: clusters are found anew")
    return state | {"clustering": {name: state[name] for name in CLUSTERING.split() if name in state}}


def read_sub_classes(folder: Path, super_classes: int, num_sub: int) -> list[dict[str, Tensor]]:
    """Scores of sub-classes in the official ``<training group>-pred_layer.pth.tar`` of a folder, in order; [] without.

    Raises:
        ValueError: If one of them is missing or of another shape.
    """
    files = [Path(folder) / f"{number}-pred_layer.pth.tar" for number in range(super_classes)]
    if not any(file.exists() for file in files):
        return []
    found = []
    for file in files:
        if not file.exists():
            raise ValueError(f"{file} is missing, --super_classes {super_classes} needs it")
        state = safe_load(file)
        if not isinstance(state, Mapping) or "state_dict" not in state:
            raise ValueError(f"{file} has no state_dict")
        tensors = {name.removeprefix(MODULE): value for name, value in state["state_dict"].items()}
        if set(tensors) != {"weight", "bias"} or len(tensors["weight"]) != num_sub or len(tensors["bias"]) != num_sub:
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
            raise ValueError(
                f"{file} is not of the {num_sub} sub-classes that --k and --super_classes ask for: {shapes}"
            )
        found.append(tensors)
    return found
