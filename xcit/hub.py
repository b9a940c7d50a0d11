"""XCiT's networks (the published ones, then timm's and torchvision's), their released weights and images."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from shared.networks import pretrained as networks
from shared.networks.card import Card, Release
from shared.networks.classifiers import build_library_classifier, fill_classifier, num_classes_of
from shared.networks.names import join_qkv, renamed, split_qkv

from .cross_covariance_transformer import ARCHITECTURES, XCiT, build_xcit

CROP_RATIO = 0.875  # of the centre crop and the resized short side; 1 for the published numbers (--full_crop)
VARIANTS = ("224", "224_dist", "384_dist")  # pixels of the (last) training, distilled or not


def build_network(name: str, num_classes: int, img_size: int | None = None, **options) -> nn.Module:
    """A randomly initialised network that maps images (B, C, H, W) to logits (B, num_classes).

    Args:
        name: A published XCiT (``xcit_small_12_p16``), or, to compare with, a model of timm or of torchvision.
        img_size: Side of the images in pixels, for timm's networks whose weights depend on it.
        options: ``in_chans``, ``drop_rate`` and ``drop_path_rate``.
    """
    if name in ARCHITECTURES:
        return build_xcit(name, num_classes=num_classes, **options)
    return build_library_classifier(name, num_classes, own_names=ARCHITECTURES, img_size=img_size, **options)


def build_backbone(arch: str, **options) -> XCiT:
    """A published network without its classifier."""
    return build_xcit(arch, **{"num_classes": 0} | options)


# --- Weights ----------------------------------------------------------------------------------------------------------


def from_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with timm's names for XCiT in the published ones; any other one stays as it is.

    In class attention timm has three layers where the published networks have one.
    """
    if "pos_embed.token_projection.weight" not in tensors:
        return dict(tensors)
    return join_qkv(renamed(tensors, {r"^pos_embed\.": "pos_embeder."}))


def to_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`from_timm`."""
    return split_qkv(renamed(tensors, {r"^pos_embeder\.": "pos_embed."}), within="cls_attn_blocks")


CARD = Card(
    name="xcit",
    build=build_backbone,
    releases={
        f"{arch}_{variant}": Release(arch, f"{arch}_{variant}.pth") for arch in ARCHITECTURES for variant in VARIANTS
    }
    | {  # backbones without a head, trained with DINO
        f"xcit_{size}_p{patch_size}_dino": Release(f"xcit_{size}_p{patch_size}", f"xcit_{size}_cp{patch_size}_dino.pth")
        for size in ("small_12", "medium_24")
        for patch_size in (16, 8)
    },
    address="https://dl.fbaipublicfiles.com/xcit/",
    interpolation="bicubic",
    checkpoint_key="model",
    rename=from_timm,
    arch_flag="--model",
)
MEAN, STD = CARD.mean, CARD.std
read_weights = partial(networks.read_tensors, CARD)  # of a release, a file or an address


def load_network(model: str, pretrained: str | Path = "", key: str = CARD.checkpoint_key, **options) -> XCiT:
    """A published network with the classes and channels of the file, filled, in evaluation mode.

    A file without a classifier gives a network without one, which maps images to features.

    Args:
        pretrained: A release, a file or an address; ``""``: the release at 224 pixels without distillation.
        options: Arguments of :class:`XCiT`, which win over the file.
    """
    pretrained = pretrained or f"{model}_224"
    tensors = read_weights(pretrained, key)
    network = networks.build_for(CARD, model, tensors, **{"num_classes": num_classes_of(tensors)} | options)
    fill_classifier(network, tensors, str(pretrained))
    return network.eval()


def entry(name: str) -> Callable[..., nn.Module]:
    """The function of torch.hub for a published network, with its classifier."""

    def build(pretrained: bool | str = True, variant: str = "224", **kwargs) -> nn.Module:
        if not isinstance(pretrained, bool):  # a run or a file of one's own
            return load_network(name, pretrained, **kwargs)
        network = build_xcit(name, **kwargs)
        if pretrained:
            fill_classifier(network, read_weights(f"{name}_{variant}"), f"{name}_{variant}")
        return network

    build.__name__ = build.__qualname__ = name
    size, depth, patch_size = name.removeprefix("xcit_").split("_")
    build.__doc__ = f"XCiT-{size[0].upper()}{depth}/{patch_size[1:]}; variants: {', '.join(VARIANTS)}."
    return build


ENTRIES = {name: entry(name) for name in ARCHITECTURES}
