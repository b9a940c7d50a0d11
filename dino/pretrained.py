"""Released DINO weights: where they are, and backbones filled with them or with a file."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from shared import distributed
from shared.networks.weights import download, load_backbone_weights, read_backbone_weights, vit_shape

from .networks import VIT_NAMES, build_backbone

BASE_URL = "https://dl.fbaipublicfiles.com/dino/"
RUN_ON_DIGITS = "runs/digits/checkpoint.pth"  # where main_dino.py leaves the network of the embedded data


class Release(NamedTuple):
    arch: str
    patch_size: int
    backbone: str
    linear: str


def _release(arch: str, patch_size: int, name: str) -> Release:
    return Release(
        arch, patch_size, f"{name}_pretrain/{name}_pretrain.pth", f"{name}_pretrain/{name}_linearweights.pth"
    )


# The patch size of XCiT is part of its name; convnets have none.
RELEASES = {
    "dino_vits16": _release("vit_small", 16, "dino_deitsmall16"),
    "dino_vits8": _release("vit_small", 8, "dino_deitsmall8"),
    "dino_vitb16": _release("vit_base", 16, "dino_vitbase16"),
    "dino_vitb8": _release("vit_base", 8, "dino_vitbase8"),
    "dino_resnet50": _release("resnet50", 0, "dino_resnet50"),
    "dino_xcit_small_12_p16": _release("xcit_small_12_p16", 0, "dino_xcit_small_12_p16"),
    "dino_xcit_small_12_p8": _release("xcit_small_12_p8", 0, "dino_xcit_small_12_p8"),
    "dino_xcit_medium_24_p16": _release("xcit_medium_24_p16", 0, "dino_xcit_medium_24_p16"),
    "dino_xcit_medium_24_p8": _release("xcit_medium_24_p8", 0, "dino_xcit_medium_24_p8"),
}
VITS8_300_EPOCHS = "dino_deitsmall8_300ep_pretrain/dino_deitsmall8_300ep_pretrain.pth"  # for attention maps
VITS16_LANDMARKS = (
    "dino_vitsmall16_googlelandmark_pretrain/dino_vitsmall16_googlelandmark_pretrain.pth"  # for retrieval
)


def find_release(arch: str, patch_size: int) -> Release | None:
    """The released weights of an architecture, if there are any."""
    arch = arch.replace("deit", "vit")
    matches = (r for r in RELEASES.values() if r.arch == arch and r.patch_size in (0, patch_size))
    return next(matches, None)


def fetch(file: str) -> Path:
    """Download a released file, unless it is there already, into torch hub's folder of checkpoints.

    Args:
        file: Path below the base address, which the environment variable ``DINO_WEIGHTS_URL`` replaces.

    Raises:
        shared.networks.weights.DownloadError: If it cannot be had.
    """
    url = os.environ.get("DINO_WEIGHTS_URL", BASE_URL).rstrip("/") + "/" + file
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(file).name
    if not path.exists():
        distributed.print_once(f"downloading {url} to {path}")
        download(url, path)
    return path


def load_pretrained(
    arch: str,
    patch_size: int,
    pretrained_weights: str | Path = "",
    checkpoint_key: str = "teacher",
    allow_partial: bool = False,
) -> tuple[nn.Module, int]:
    """Build a backbone and fill it, as the evaluation scripts do with their flags of these names.

    The image size of a ViT's position embeddings and the number of channels are taken from the file.

    Args:
        arch: See :func:`dino.networks.build_backbone`.
        patch_size: Side of a ViT's patches in pixels.
        pretrained_weights: A file of any layout; ``""`` for the released weights; ``"random"`` for none.
        checkpoint_key: The network to take from a training checkpoint.
        allow_partial: Load what fits when the file does not fill the network.

    Returns:
        The backbone in evaluation mode, without gradients, and its embedding dimension.

    Raises:
        ValueError: If there are no released weights, no such file, or the file does not fill the network.
    """
    if pretrained_weights == "random":
        backbone, embed_dim = build_backbone(arch, patch_size)
        return backbone.eval().requires_grad_(False), embed_dim
    if pretrained_weights == "":
        release = find_release(arch, patch_size)
        if release is None:
            raise ValueError(
                f"no weights are released for --arch {arch} --patch_size {patch_size}; give a file, or random, "
                "as --pretrained_weights"
            )
        pretrained_weights = fetch(release.backbone)
    if not Path(pretrained_weights).is_file():
        hint = ": run python main_dino.py first" if str(pretrained_weights) == RUN_ON_DIGITS else ""
        raise ValueError(f"--pretrained_weights {pretrained_weights} is not a file{hint}")

    weights = read_backbone_weights(pretrained_weights, checkpoint_key)
    shape = vit_shape(weights.tensors)
    fits = shape is not None and (arch not in VIT_NAMES or shape.patch_size == patch_size)
    img_size = shape.img_size if fits else 224
    backbone, embed_dim = build_backbone(arch, patch_size, img_size=img_size)
    first = next(name for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d))
    in_chans = weights.tensors[f"{first}.weight"].shape[1] if f"{first}.weight" in weights.tensors else 3
    if in_chans != 3:
        backbone, embed_dim = build_backbone(arch, patch_size, img_size=img_size, in_chans=in_chans)
    load_backbone_weights(backbone, weights, allow_partial=allow_partial)
    return backbone.eval().requires_grad_(False), embed_dim
