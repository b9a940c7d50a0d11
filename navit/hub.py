"""NaViT's networks, and weights of a related network that fill them."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from shared.networks.card import Card, Release
from shared.networks.classifiers import load_completely
from shared.networks.pretrained import hub_entries, locate
from shared.networks.weights import WeightMismatch, flags_of_training, safe_load, select_backbone_weights

from .native_resolution_vit import CHOICES, SIZES, NaViT, checkpoint_filter_fn


def build(arch: str, in_chans: int = 3, img_size: int = 0, **options) -> NaViT:
    """A network of a size like ``navit_b``, with a classifier if ``num_classes`` is given; any ``img_size`` will do."""
    size = arch.removeprefix("navit_")
    if size not in SIZES or size == arch:
        raise ValueError(f"{arch} is none of {', '.join(f'navit_{name}' for name in SIZES)}")
    width, depth, num_heads = SIZES[size]
    return NaViT(width, depth, num_heads, in_chans=in_chans, **options)


def sizes(arch: str, tensors: Mapping[str, Tensor]) -> dict:
    """Arguments of :class:`NaViT` that its tensors, or those of timm's NaFlexViT, tell."""
    tensors = checkpoint_filter_fn(tensors)
    positions = next((value for name, value in tensors.items() if name.startswith("pos_embed.")), None)
    if positions is None or not {"choices", "patch_embed.weight"} <= tensors.keys():
        raise WeightMismatch(
            f"{arch} is no NaViT: it lacks patch_embed.weight, choices, or pos_embed.x (.table, .weight)"
        )
    found = {name: values[int(i)] for (name, values), i in zip(CHOICES.items(), tensors["choices"], strict=False)}
    kernel = tensors["patch_embed.weight"]
    found |= {"patch_size": kernel.shape[-1]} if kernel.dim() == 4 else {"vocabulary": len(kernel)}
    found |= {"qk_norm": "blocks.0.attn.q_norm.weight" in tensors, "bias": "blocks.0.attn.qkv.bias" in tensors}
    return found | {"max_side": len(positions), "pool": "map" if "attn_pool.latent" in tensors else "gap"}


CARD = Card(
    name="navit",
    build=build,
    releases={
        "naflexvit_b16_siglip2": Release(
            "navit_b",
            "naflexvit_base_patch16_siglip.v2_webli/resolve/main/model.safetensors",
            "The image network of SigLIP 2 NaFlex, a related one, for images in [-1, 1] of any size and shape.",
            options={"positions": "table", "max_side": 16, "qk_norm": False, "bias": True},
            cached_as="naflexvit_base_patch16_siglip.v2_webli.safetensors",
        )
    },
    address="https://huggingface.co/timm/",
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    checkpoint_key="model",
    head_names=("head",),
    sizes=sizes,
)
ENTRIES = hub_entries(CARD)


def eval_transform(image_size: int | None, network: NaViT, trained_with: Mapping) -> Callable:
    """Centre squares of the largest resolution of the training, in whole patches."""
    from shared.evaluation import frozen

    side = image_size or max(trained_with.get("resolution", (14 * network.patch_size,)))
    return frozen.eval_transform(CARD, network.patch_size * max(1, round(side / network.patch_size)), network)


def load_navit(pretrained: str | Path, flag: str = CARD.weights_flag) -> tuple[list[NaViT], Mapping]:
    """The network of a run with its classifier, or those of images and texts, in evaluation mode; the run's flags."""
    checkpoint = safe_load(locate(CARD, pretrained, flag))
    networks, origin = [], f"{flag} {pretrained}"
    for key in ("model", "text")[: 2 if "text" in checkpoint else 1]:
        tensors = checkpoint_filter_fn(select_backbone_weights(checkpoint, key, origin).tensors)
        options, kernel = sizes(origin, tensors), tensors["patch_embed.weight"]
        options |= {"in_chans": kernel.shape[1]} if kernel.dim() == 4 else {}
        depth = 1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("blocks."))
        width, heads = tensors["norm.weight"].numel(), int(tensors["choices"][-1])
        classes, hidden = len(tensors.get("head.bias", ())), len(tensors["blocks.0.mlp.fc1.bias"])
        networks.append(NaViT(width, depth, heads, num_classes=classes, hidden_dim=hidden, **options).eval())
        load_completely(networks[-1], tensors, origin)
    return networks, flags_of_training(checkpoint)
