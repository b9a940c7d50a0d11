"""Released MSN weights: where they are, and encoders filled with them or with a file."""

import argparse
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from shared import distributed
from shared.weights import WeightMismatch, download, load_backbone_weights, read_backbone_weights

from .vision_transformer import ARCHITECTURES, VisionTransformer, build

BASE_URL = "https://dl.fbaipublicfiles.com/msn/"


class Release(NamedTuple):
    model_name: str
    file: str


RELEASES = {
    "msn_vits16": Release("deit_small", "vits16_800ep.pth.tar"),
    "msn_vitb16": Release("deit_base", "vitb16_600ep.pth.tar"),
    "msn_vitl16": Release("deit_large", "vitl16_600ep.pth.tar"),
    "msn_vitb4": Release("deit_base_p4", "vitb4_300ep.pth.tar"),
    "msn_vitl7": Release("deit_large_p7", "vitl7_200ep.pth.tar"),
}
RUN_ON_DIGITS = {"model_name": "deit_micro", "pretrained": "runs/digits", "fname": "msn-latest.pth.tar"}


def set_embedded_data_defaults(parser: argparse.ArgumentParser) -> None:
    """Defaults for the network that ``main.py`` trains on the embedded 8x8 pixel digits."""
    parser.set_defaults(**RUN_ON_DIGITS)


def fetch(file: str) -> Path:
    """Download a released file, unless it is there already, into torch hub's folder of checkpoints.

    Args:
        file: Name below the base address, which the environment variable ``MSN_WEIGHTS_URL`` replaces.

    Raises:
        shared.weights.DownloadError: If it cannot be had.
    """
    url = os.environ.get("MSN_WEIGHTS_URL", BASE_URL).rstrip("/") + "/" + file
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"msn_{file}"
    if not path.exists():
        distributed.print_once(f"downloading {url} to {path}")
        download(url, path)
    return path


def find_weights(model_name: str, pretrained: str | Path, fname: str) -> Path:
    """The file that the flags of these names mean; without them, the released one of the architecture.

    Raises:
        ValueError: If there is none.
    """
    if not pretrained and not fname:
        release = next((r for r in RELEASES.values() if r.model_name == model_name), None)
        if release is None:
            raise ValueError(
                f"no weights are released for --model_name {model_name}; give a file as --pretrained, or random"
            )
        return fetch(release.file)
    path = Path(pretrained, fname)
    if not path.is_file():
        hint = ": run python main.py first" if path == Path(RUN_ON_DIGITS["pretrained"], RUN_ON_DIGITS["fname"]) else ""
        raise ValueError(f"--pretrained {pretrained} --fname {fname}: {path} is not a file{hint}")
    return path


def load_encoder(
    model_name: str,
    pretrained: str | Path = "",
    fname: str = "",
    checkpoint_key: str = "target_encoder",
    allow_partial: bool = False,
) -> VisionTransformer:
    """Build an encoder without a head and fill it, as the evaluation scripts do with their flags of these names.

    Sizes of images and patches and the number of channels are taken from the file.

    Args:
        model_name: A name of ``ARCHITECTURES``.
        pretrained: Folder of ``fname``, or a file of any layout; ``random`` for no weights; without either the released
            weights.
        fname: File in the folder ``pretrained``.
        checkpoint_key: The network to take from a training checkpoint.
        allow_partial: Load what fits when the file does not fill the network.

    Returns:
        The encoder in evaluation mode, without gradients; its output is the class token after the final norm.

    Raises:
        ValueError: If there are no such weights, or they do not fill the network.
    """
    if pretrained == "random":
        return build(model_name).eval().requires_grad_(False)
    path = find_weights(model_name, pretrained, fname)
    try:
        weights = read_backbone_weights(path, checkpoint_key, head_names=("fc",))
    except WeightMismatch as error:
        raise WeightMismatch(f"{error}; see --checkpoint_key {checkpoint_key}") from error
    encoder = build(model_name, **sizes_in(weights.tensors, model_name))
    load_backbone_weights(encoder, weights, allow_partial=allow_partial)
    return encoder.eval().requires_grad_(False)


def sizes_in(tensors: dict[str, torch.Tensor], model_name: str) -> dict[str, int]:
    """What a state dict says about image size, patch size and channels; nothing where it says nothing."""
    sizes = {"patch_size": ARCHITECTURES[model_name]["patch_size"]}
    for first in ("patch_embed.proj.weight", "patch_embed.stem.0.weight"):
        if first in tensors:
            sizes["in_chans"] = tensors[first].shape[1]
    if "patch_embed.proj.weight" in tensors:
        sizes["patch_size"] = tensors["patch_embed.proj.weight"].shape[2]
    if "pos_embed" in tensors:
        sizes["img_size"] = math.isqrt(tensors["pos_embed"].shape[1] - 1) * sizes["patch_size"]
    return sizes
