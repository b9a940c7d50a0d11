"""FlexiViT's networks, their released weights and images."""

import math
from collections.abc import Mapping

from torch import Tensor

from shared.networks.card import Card, Release
from shared.networks.pretrained import hub_entries
from shared.networks.weights import WeightMismatch

from .flexible_vit import SIZES, FlexiViT


def build(arch: str, in_chans: int = 3, img_size: int = 0, **options) -> FlexiViT:
    """A network of a published size (``flexivit_s``), without a classifier unless ``num_classes`` is among the options.

    Any ``img_size`` will do: positions are resized to the image.
    """
    size = arch.removeprefix("flexivit_")
    if size not in SIZES or size == arch:
        raise ValueError(f"{arch} is none of {', '.join(f'flexivit_{name}' for name in SIZES)}")
    width, depth, num_heads = SIZES[size]
    return FlexiViT(width, depth, num_heads, in_chans=in_chans, **options)


def sizes(arch: str, tensors: Mapping[str, Tensor]) -> dict:
    """Arguments of :class:`FlexiViT` that its tensors tell; ``WeightMismatch`` for those of another network."""
    kernel, positions = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    if kernel is None or kernel.dim() != 4:
        raise WeightMismatch(f"{arch}: no patch embedding of a FlexiViT")
    height, width = kernel.shape[-2:]
    found = {
        "patch_size": height if height == width else (height, width),
        "positions": "sincos2d" if positions is None else "learn",
    }
    if positions is not None:
        side = math.isqrt(positions.shape[1])
        if side**2 != positions.shape[1]:
            raise WeightMismatch(f"{arch}: {positions.shape[1]} positions are no square grid")
        found["grid"] = (side, side)
    pools = {"cls_token": "tok", "attn_pool.latent": "map"}
    return found | {"pool": next((pool for name, pool in pools.items() if name in tensors), "gap")}


I1K = [f"flexivit_{size}_i1k{epochs}" for size in "sbl" for epochs in ("", "_600ep", "_300ep", "_90ep")]
I21K = [*(f"flexivit_b_i21k_{epochs}ep" for epochs in (90, 300, 1000)), "vit_b16_i21k_300ep", "vit_b30_i21k_300ep"]
DOC = "Call it with patch_size= or grid=, on images of 240 pixels in [-1, 1]."
CARD = Card(
    name="flexivit",
    build=build,
    releases={
        **{name: Release(name[:10], f"{name}.npz", DOC, options={"num_classes": 1000}) for name in I1K},
        **{name: Release("flexivit_b", f"{name}.npz", DOC, options={"num_classes": 21843}) for name in I21K},
    },
    address="https://storage.googleapis.com/big_vision/flexivit/",
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    checkpoint_key="model",
    head_names=("head",),
    sizes=sizes,
)
MEAN, STD = CARD.mean, CARD.std


def load(pretrained: str, **options) -> FlexiViT:
    """The filled network of a release, a run or a file."""
    from .checkpoints import load_flexible  # which needs the card

    return load_flexible(pretrained)


ENTRIES = hub_entries(CARD, load)
