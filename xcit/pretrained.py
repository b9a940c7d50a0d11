"""Released weights, and networks filled with them or with a file of any layout."""

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

from .cross_covariance_transformer import ARCHITECTURES, XCiT, build_xcit

BASE_URL = "https://dl.fbaipublicfiles.com/xcit/"
VARIANTS = ("224", "224_dist", "384_dist")  # resolution of the (last) training; distilled or not
RELEASES = {f"{name}_{variant}": f"{name}_{variant}.pth" for name in ARCHITECTURES for variant in VARIANTS}
RELEASES |= {  # backbones without a head, trained with DINO
    f"xcit_{size}_p{patch_size}_dino": f"xcit_{size}_cp{patch_size}_dino.pth"
    for size in ("small_12", "medium_24")
    for patch_size in (16, 8)
}


def fetch(release: str) -> Path:
    """Download released weights, unless they are there already, into torch hub's folder of checkpoints.

    Args:
        release: A key of ``RELEASES``. The environment variable ``XCIT_WEIGHTS_URL`` replaces the base address.

    Raises:
        shared.networks.weights.DownloadError: If they cannot be had.
    """
    file = RELEASES[release]
    url = os.environ.get("XCIT_WEIGHTS_URL", BASE_URL).rstrip("/") + "/" + file
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.exists():
        distributed.print_once(f"downloading {url} to {path}")
        download(url, path)
    return path


def read_weights(pretrained: str | Path, key: str = "model", flag: str = "--pretrained") -> dict[str, Tensor]:
    """Tensors of a release, a file or an address, under the published names.

    Args:
        key: The network to take from a training checkpoint.
        flag: Where ``pretrained`` was given, for messages.

    Raises:
        ValueError: If there is no such file, or it holds no network.
    """
    file = fetch(str(pretrained)) if str(pretrained) in RELEASES else fetch_file(str(pretrained), flag)
    return from_timm(select_backbone_weights(safe_load(file), key, str(pretrained)).tensors)


def from_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with timm's names for XCiT in the published ones; any other one stays as it is."""
    if "pos_embed.token_projection.weight" not in tensors:
        return dict(tensors)
    renamed = {}
    for name, value in tensors.items():
        if match := re.fullmatch(r"(cls_attn_blocks\.\d+\.attn\.)[qkv]\.(weight|bias)", name):
            # timm has three layers where the published networks have one
            parts = [tensors[f"{match[1]}{part}.{match[2]}"] for part in "qkv"]
            renamed[f"{match[1]}qkv.{match[2]}"] = torch.cat(parts)
        else:
            renamed[name.replace("pos_embed.", "pos_embeder.")] = value
    return renamed


def to_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the published names in timm's."""
    renamed = {}
    for name, value in tensors.items():
        if match := re.fullmatch(r"(cls_attn_blocks\.\d+\.attn\.)qkv\.(weight|bias)", name):
            renamed |= {f"{match[1]}{part}.{match[2]}": t for part, t in zip("qkv", value.chunk(3), strict=True)}
        else:
            renamed[name.replace("pos_embeder.", "pos_embed.")] = value
    return renamed


def fill(network: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> bool:
    """Load a state dict completely; a classifier for other classes is left out, with a message.

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
    classifier = [name for name in target if name.split(".")[0] in CLASSIFIERS]
    fits = all(name in tensors and tensors[name].shape == target[name].shape for name in classifier)
    if not fits:
        tensors = {name: value for name, value in tensors.items() if name.split(".")[0] not in CLASSIFIERS}
        tensors |= {name: target[name] for name in classifier}
        distributed.print_once(f"{origin}: its classifier is for other classes, or it has none; ours stays random")
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise WeightMismatch(f"{origin} does not fill the network: {' '.join(str(error).split())[:1000]}") from error
    distributed.print_once(f"{origin}: {len(tensors) - len(classifier) * (not fits)}/{len(target)} entries loaded")
    return fits


def load_network(model: str, pretrained: str | Path = "", key: str = "model") -> XCiT:
    """A published network, filled, in evaluation mode.

    Classes and channels are those of the file; a file without a classifier gives a network without one, which maps
    images to features.

    Args:
        model: A name of ``ARCHITECTURES``.
        pretrained: A release, a file of any layout or an address; ``""``: the release at 224 pixels without
            distillation.
        key: The network to take from a training checkpoint.
    """
    pretrained = pretrained or f"{model}_224"
    tensors = read_weights(pretrained, key)
    in_chans = tensors["patch_embed.proj.0.0.weight"].shape[1] if "patch_embed.proj.0.0.weight" in tensors else 3
    num_classes = tensors["head.weight"].shape[0] if "head.weight" in tensors else 0
    network = build_xcit(model, num_classes=num_classes, in_chans=in_chans)
    fill(network, tensors, str(pretrained))
    return network.eval()
