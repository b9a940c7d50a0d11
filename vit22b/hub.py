"""The networks of ViT-22B and their images; no weights were released."""

import math
from collections.abc import Mapping

from torch import Tensor

from shared.networks.card import Card
from shared.networks.weights import WeightMismatch

from .scaled_vit import SIZES, ScaledViT, Share, Switches


def build(arch: str, in_chans: int = 3, img_size: int = 224, model_parallel: int = 1, **options) -> ScaledViT:
    """A network of a published size (``vit_22b``), without a classifier unless ``num_classes`` is among the options.

    With ``model_parallel`` it has the shapes of what one of so many processes holds, for the meta device.
    """
    size = str(arch).removeprefix("vit_")
    if size not in SIZES or size == arch:
        raise ValueError(f"{arch} is none of {', '.join(f'vit_{name}' for name in SIZES)}")
    return ScaledViT(
        *SIZES[size], img_size=img_size, in_chans=in_chans, **{"share": Share(0, model_parallel)} | options
    )


def sizes(arch: str, tensors: Mapping[str, Tensor]) -> dict:
    """Arguments of :func:`build` that the tensors of a network tell; ``WeightMismatch`` for those of another one."""
    kernel, positions = tensors.get("patches.weight"), tensors.get("patches.positions")
    if kernel is None or positions is None or "blocks.0.weight_in" not in tensors:
        raise WeightMismatch(f"{arch}: another layout, without the fused matrices of a ViT-22B")
    side = math.isqrt(positions.shape[1])
    if side**2 != positions.shape[1]:
        raise WeightMismatch(f"{arch}: {positions.shape[1]} positions are no square grid")
    kinds = {"norm.scale": "rmsnorm", "norm.bias": "layernorm", "norm.weight": "layernorm_nobias"}
    parallel = not any(name.startswith("blocks.0.mlp_norm.") for name in tensors)
    switches = Switches(
        parallel=parallel,
        fused=parallel,
        qk_norm=any(name.startswith("blocks.0.q_norm.") for name in tensors),
        norm=next((kind for name, kind in kinds.items() if name in tensors), "rmsnorm"),
        qkv_bias="blocks.0.qkv_bias" in tensors,
        out_bias="blocks.0.attention_bias" in tensors,
        mlp_bias="blocks.0.hidden_bias" in tensors,
    )
    pool = "map" if "pool.probe" in tensors else "gap"
    return {"patch_size": kernel.shape[-1], "img_size": side * kernel.shape[-1], "pool": pool, "switches": switches}


CARD = Card(
    name="vit22b",
    build=build,
    releases={},
    address="",
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    checkpoint_key="model",
    head_names=("head",),
    sizes=sizes,
)
MEAN, STD = CARD.mean, CARD.std
ENTRIES: dict = {}
