"""MSN's networks: the ViTs of this folder, their released weights and their images."""

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from shared.networks import pretrained
from shared.networks.card import Card, Release
from shared.networks.weights import WeightMismatch, run_file

from .vision_transformer import ARCHITECTURES, Trunk, build

DEFAULT_MODEL = "deit_small"
ONE_IMAGE = "with one ImageNet image per class"


def sizes(model_name: str, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Image and patch size; nothing about an image size where there are no positions."""
    if model_name not in ARCHITECTURES:
        raise WeightMismatch(f"{model_name} is none of {', '.join(ARCHITECTURES)}")
    patches, positions = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    patch_size = ARCHITECTURES[model_name]["patch_size"] if patches is None else patches.shape[2]
    if positions is None:
        return {"patch_size": patch_size}
    return {"patch_size": patch_size, "img_size": math.isqrt(positions.shape[1] - 1) * patch_size}


CARD = Card(
    name="msn",
    build=build,
    releases={
        name: Release(arch, f"{stem}.pth.tar", f"MSN, {doc}.", cached_as=f"msn_{stem}.pth.tar")
        for name, arch, stem, doc in (
            ("msn_vits16", "deit_small", "vits16_800ep", f"800 epochs: ViT-S/16, 384 dimensions (47.1 {ONE_IMAGE})"),
            ("msn_vitb16", "deit_base", "vitb16_600ep", f"600 epochs: ViT-B/16, 768 dimensions (49.8 {ONE_IMAGE})"),
            ("msn_vitl16", "deit_large", "vitl16_600ep", "600 epochs: ViT-L/16, 1024 dimensions"),
            ("msn_vitb4", "deit_base_p4", "vitb4_300ep", f"300 epochs: ViT-B/4, 768 dimensions (54.3 {ONE_IMAGE})"),
            ("msn_vitl7", "deit_large_p7", "vitl7_200ep", f"200 epochs: ViT-L/7, 1024 dimensions (57.1 {ONE_IMAGE})"),
        )
    },
    address="https://dl.fbaipublicfiles.com/msn/",
    interpolation="bilinear",
    embedded_run="runs/materials",  # folder of the run that main.py makes without images
    checkpoint_key="target_encoder",
    head_names=("fc",),
    sizes=sizes,
    arch_flag="--model_name",
)
MEAN, STD = CARD.mean, CARD.std
ENTRIES = pretrained.hub_entries(CARD)


# --- Files of runs ----------------------------------------------------------------------------------------------------


def load_pretrained(model_name: str, weights: str | Path = "", fname: str = "", **options) -> Trunk:
    """The trunk of a run, a file or a release, whose ``encoder`` is filled, frozen and in evaluation mode."""
    return Trunk(pretrained.load_pretrained(CARD, model_name, file_in(weights, fname), **options))


def file_in(folder: str | Path, fname: str, file_flag: str = "fname") -> str | Path:
    """A file in the folder of a run, by default its only checkpoint; anything but a folder stays as it is."""
    path = Path(folder, fname)
    if not path.is_dir() or (not folder and not fname):
        return path if fname else folder
    try:
        return run_file(path)
    except ValueError as error:
        hint = f": run python {CARD.main} first" if str(folder) == CARD.embedded_run else ""
        raise ValueError(f"--pretrained {error} as --{file_flag}{hint}") from error
