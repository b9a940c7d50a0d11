"""Released weights, and networks filled with them or with a file of any layout."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from shared import distributed
from shared.networks.weights import (
    CLASSIFIERS,
    WeightMismatch,
    download,
    fetch_file,
    safe_load,
    select_backbone_weights,
)

from .resmlp_models import ResMLP, resize_cross_patch_layers

BASE_URL = "https://dl.fbaipublicfiles.com/deit/"
RUN_ON_DIGITS = "runs/digits/checkpoint.pth"  # where main.py leaves the network of the embedded data
RELEASES = {
    f"{arch}_{variant}": arch
    for arch, variants in {
        "resmlp_12": ("no_dist", "dist", "dino"),
        "resmlp_24": ("no_dist", "dist", "dino"),
        "resmlp_36": ("no_dist", "dist"),
        "resmlpB_24": ("no_dist", "dist", "22k"),
    }.items()
    for variant in variants
}
# our names -> timm's, beside the blocks' numbers
TIMM_NAMES = (("patch_embed.", "stem."), (".attn.", ".linear_tokens."), (".mlp.", ".mlp_channels."), (".gamma_", ".ls"))


def fetch(release: str) -> Path:
    """Download released weights, unless they are there already, into torch hub's folder of checkpoints.

    Args:
        release: A key of ``RELEASES``. The environment variable ``RESMLP_WEIGHTS_URL`` replaces the base address.

    Raises:
        shared.networks.weights.DownloadError: If they cannot be had.
    """
    file = f"{release}.pth"
    url = os.environ.get("RESMLP_WEIGHTS_URL", BASE_URL).rstrip("/") + "/" + file
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.exists():
        distributed.print_once(f"downloading {url} to {path}")
        download(url, path)
    return path


def read_weights(pretrained: str | Path, key: str = "model", flag: str = "--pretrained_weights") -> dict[str, Tensor]:
    """Tensors of a release, a file or an address, under the published names.

    Files of main.py, of DINO (``teacher`` where nothing else is asked for), of the official code and of timm are
    understood.

    Args:
        key: The network to take from a training checkpoint.
        flag: Where ``pretrained`` was given, for messages.

    Raises:
        ValueError: If there is no such file, or it holds no network.
    """
    file = fetch(str(pretrained)) if str(pretrained) in RELEASES else fetch_file(str(pretrained), flag)
    checkpoint = safe_load(file)
    if isinstance(checkpoint, Mapping) and "teacher" in checkpoint and key == "model":
        key = "teacher"
    return from_timm(select_backbone_weights(checkpoint, key, str(pretrained)).tensors)


def from_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with timm's names for ResMLP in the published ones; any other one stays as it is."""
    if "stem.proj.weight" not in tensors:
        return dict(tensors)
    renamed = {}
    for name, value in tensors.items():
        for ours, theirs in TIMM_NAMES:
            name = name.replace(theirs, ours)
        renamed[name] = value.flatten() if name.endswith((".alpha", ".beta")) else value
    return renamed


def to_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`from_timm`; timm's affine layers have the shape (1, 1, D)."""
    renamed = {}
    for name, value in tensors.items():
        for ours, theirs in TIMM_NAMES:
            name = name.replace(ours, theirs)
        renamed[name] = value.reshape(1, 1, -1) if name.endswith((".alpha", ".beta")) else value
    return renamed


def fill(network: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> bool:
    """Load a state dict completely; a classifier for other classes is left out, with a message.

    A ResMLP for images of another size takes the cross-patch layers interpolated, which is stated too.

    Args:
        origin: Where the tensors come from, for messages.

    Returns:
        Whether the classifier was filled too.

    Raises:
        WeightMismatch: If anything else is missing, unknown, of another shape or not finite.
    """
    target = network.state_dict()
    tensors = dict(tensors)
    if (bad := next((name for name, value in tensors.items() if not value.isfinite().all()), None)) is not None:
        raise WeightMismatch(f"{origin}: {bad} holds values that are not finite")
    if isinstance(network, ResMLP) and "blocks.0.attn.weight" in tensors:
        grid = math.isqrt(len(tensors["blocks.0.attn.weight"]))
        if grid != network.grid:
            distributed.print_once(
                f"{origin}: cross-patch layers for {grid}x{grid} patches, interpolated to {network.grid}x{network.grid}"
            )
            tensors = resize_cross_patch_layers(tensors, network.grid)
    classifier = [name for name in target if name.split(".")[0] in CLASSIFIERS]
    fits = all(name in tensors and tensors[name].shape == target[name].shape for name in classifier)
    if not fits or not classifier:
        tensors = {name: value for name, value in tensors.items() if name.split(".")[0] not in CLASSIFIERS}
        tensors |= {name: target[name] for name in classifier}
    if not fits:
        distributed.print_once(f"{origin}: its classifier is for other classes, or it has none; ours stays random")
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise WeightMismatch(f"{origin} does not fill the network: {' '.join(str(error).split())[:1000]}") from error
    distributed.print_once(f"{origin}: {len(tensors) - len(classifier) * (not fits)}/{len(target)} entries loaded")
    return fits


def shape_of(tensors: Mapping[str, Tensor], origin: str) -> dict[str, int]:
    """Arguments of :class:`ResMLP` that a state dict under the published names tells.

    Raises:
        WeightMismatch: If it is that of another network.
    """
    patches, mixing = tensors.get("patch_embed.proj.weight"), tensors.get("blocks.0.attn.weight")
    if patches is None or mixing is None or patches.dim() != 4 or math.isqrt(len(mixing)) ** 2 != len(mixing):
        raise WeightMismatch(f"{origin} holds no ResMLP")
    embed_dim, in_chans, patch_size, _ = patches.shape
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "img_size": math.isqrt(len(mixing)) * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": tensors["head.weight"].shape[0] if "head.weight" in tensors else 0,
        "embed_dim": embed_dim,
        "depth": len(blocks),
    }


def load_network(
    pretrained: str | Path = "", key: str = "model", img_size: int | None = None, classifier: bool = False
) -> ResMLP:
    """A ResMLP of the shape that its weights have, filled, in evaluation mode and without gradients.

    Args:
        pretrained: A release (``resmlp_24_dist``), a file of any layout or an address.
        key: The network to take from a training checkpoint.
        img_size: Side of the images in pixels; None: that of the weights, else the cross-patch layers are interpolated.
        classifier: Whether to keep the classifier; without it the network maps images to features.
    """
    if str(pretrained) == RUN_ON_DIGITS and not Path(pretrained).is_file():
        raise ValueError(f"--pretrained_weights {pretrained} is not a file: run python main.py first")
    tensors = read_weights(pretrained, key)
    shape = shape_of(tensors, str(pretrained))
    if img_size is not None:
        shape["img_size"] = img_size
    if not classifier:
        shape["num_classes"] = 0
    network = ResMLP(**shape)
    fill(network, tensors, str(pretrained))
    return network.eval().requires_grad_(False)
