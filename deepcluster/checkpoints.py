"""Checkpoints of the training under the names of the official ones."""

from torch import Tensor

from shared.networks.weights import select_backbone_weights

from .hub import CARD

NETWORK_FLAGS = ("arch", "sobel", "crop_size", "in_chans")  # a run is not resumed with other ones


def official_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as in the official checkpoints, whose convolutional part is wrapped for several GPUs."""
    return {
        f"features.module.{name.removeprefix('features.')}" if name.startswith("features.") else name: value
        for name, value in state_dict.items()
    }


def to_official(state: dict) -> dict:
    """The state of a run under the names of the official checkpoints."""
    clustering = state.pop("clustering")
    top_layer = {f"top_layer.{name}": value for name, value in clustering.pop("top_layer").items()}
    weights = official_names(state.pop("network")) | top_layer
    return state | clustering | {"arch": state["args"]["arch"], "state_dict": weights}


def from_official(checkpoint: dict) -> dict:
    """The way back; official files have neither flags nor clusters.

    Raises:
        ValueError: If the file is of something else.
    """
    if not {"arch", "state_dict"} <= checkpoint.keys():
        raise ValueError("no checkpoint of DeepCluster: it has no 'arch' or no 'state_dict'")
    weights = select_backbone_weights(checkpoint, CARD.checkpoint_key, "the checkpoint", CARD.head_names)
    clustering = {"evaluated_before": True, "clustered_epoch": -1, "clusters": None, "images": None}
    clustering = {name: checkpoint.get(name, without) for name, without in clustering.items()}
    clustering["top_layer"] = {name.removeprefix("top_layer."): value for name, value in weights.head.items()}
    flags = {"arch": checkpoint["arch"], "sobel": "sobel.0.weight" in weights.tensors}
    return {"args": flags} | checkpoint | {"network": weights.tensors, "clustering": clustering}
