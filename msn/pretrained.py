"""Released MSN weights: where they are, and encoders filled with them or with a file."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from shared import distributed
from shared.networks.weights import WeightMismatch, download, load_backbone_weights, safe_load, select_backbone_weights

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
DEFAULT_MODEL = "deit_small"
RUN_ON_DIGITS = "runs/digits"  # folder of the run that main.py makes without images


def fetch(file: str) -> Path:
    """Download a released file, unless it is there already, into torch hub's folder of checkpoints.

    Args:
        file: Name below the base address, which the environment variable ``MSN_WEIGHTS_URL`` replaces.

    Raises:
        shared.networks.weights.DownloadError: If it cannot be had.
    """
    url = os.environ.get("MSN_WEIGHTS_URL", BASE_URL).rstrip("/") + "/" + file
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"msn_{file}"
    if not path.exists():
        distributed.print_once(f"downloading {url} to {path}")
        download(url, path)
    return path


def find_weights(model_name: str, pretrained: str | Path, fname: str, file_flag: str = "fname") -> Path:
    """The file that the flags of these names mean; without them, the released one of the architecture.

    Args:
        file_flag: Name of the flag for ``fname``, for messages.

    Raises:
        ValueError: If there is none, or a folder holds several and ``fname`` does not say which.
    """
    if not pretrained and not fname:
        release = next((r for r in RELEASES.values() if r.model_name == model_name), None)
        if release is None:
            raise ValueError(
                f"no weights are released for --model_name {model_name}; give a file as --pretrained, or random"
            )
        return fetch(release.file)
    path = Path(pretrained, fname)
    hint = ": run python main.py first" if str(pretrained) == RUN_ON_DIGITS else ""
    if path.is_dir():
        latest = sorted(path.glob("*-latest.pth.tar"))
        if len(latest) == 1:
            return latest[0]
        found = ", ".join(file.name for file in latest or sorted(path.glob("*.pth*"))) or "no checkpoint"
        raise ValueError(f"--pretrained {pretrained} is a folder with {found}; name a file as --{file_flag}{hint}")
    if not path.is_file():
        given = f"--pretrained {pretrained}" + (f" --{file_flag} {fname}" if fname else "")
        raise ValueError(f"{given}: {path} is not a file{hint}")
    return path


class Pretrained(NamedTuple):
    """An encoder, and how it came about.

    Attributes:
        path: Its file; None for random weights.
        trained_with: Flags of its training; empty where the file does not say.
    """

    encoder: VisionTransformer
    model_name: str
    path: Path | None
    trained_with: Mapping


def load_pretrained(
    model_name: str | None,
    pretrained: str | Path = "",
    fname: str = "",
    checkpoint_key: str = "target_encoder",
    allow_partial: bool = False,
    file_flag: str = "fname",
) -> Pretrained:
    """Build an encoder without a head and fill it, as the evaluation scripts do with their flags of these names.

    Sizes of images and patches and the number of channels are taken from the file.

    Args:
        model_name: A name of ``ARCHITECTURES``; None for that of the training, ``deit_small`` where the file does not
            say.
        pretrained: Folder of ``fname``, or a file of any layout; ``random`` for no weights; without either the released
            weights.
        fname: File in the folder ``pretrained``; by default its only ``*-latest.pth.tar``.
        checkpoint_key: The network to take from a training checkpoint.
        allow_partial: Load what fits when the file does not fill the network.
        file_flag: Name of the flag for ``fname``, for messages.

    Returns:
        The encoder in evaluation mode, without gradients; its output is the class token after the final norm.

    Raises:
        ValueError: If there are no such weights, or they do not fill the network.
    """
    if pretrained == "random":
        model_name = model_name or DEFAULT_MODEL
        return Pretrained(build(model_name).eval().requires_grad_(False), model_name, None, {})
    path = find_weights(model_name or DEFAULT_MODEL, pretrained, fname, file_flag)
    checkpoint = safe_load(path)
    trained_with = flags_of_training(checkpoint)
    trained_as = trained_with.get("model_name")
    try:
        weights = select_backbone_weights(checkpoint, checkpoint_key, str(path), head_names=("fc",))
    except WeightMismatch as error:
        raise WeightMismatch(f"{error}; see --checkpoint_key {checkpoint_key}") from error
    name = model_name or trained_as or DEFAULT_MODEL
    encoder = build(name, **sizes_in(weights.tensors, name))
    try:
        load_backbone_weights(encoder, weights, allow_partial=allow_partial)
    except WeightMismatch as error:
        hint = f"it was trained with --model_name {trained_as}" if trained_as else "is it of another --model_name?"
        raise WeightMismatch(f"--model_name {name}: {error}\n{hint}") from error
    return Pretrained(encoder.eval().requires_grad_(False), name, path, trained_with)


def flags_of_training(checkpoint) -> Mapping:
    """The flags that a checkpoint of ``main.py`` was written with; files of other origin have none."""
    flags = checkpoint.get("args") if isinstance(checkpoint, Mapping) else None
    known = isinstance(flags, Mapping) and flags.get("model_name") in ARCHITECTURES
    return flags if known else {}


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
