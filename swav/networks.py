"""Networks by name: the ResNets of this folder, then torchvision, then timm, all with the same heads."""

from collections.abc import Sequence

from torch import Tensor, nn

from shared.networks.backbones import build_library_backbone, library_architectures

from . import resnet50
from .resnet50 import PrototypeNetwork

RESNETS = ("resnet50", "resnet50w2", "resnet50w4", "resnet50w5")


class LibraryNetwork(PrototypeNetwork):
    """A backbone of torchvision or timm with SwAV's projection head and prototypes.

    Args:
        backbone: Maps images (B, C, H, W) to features (B, embed_dim).
        embed_dim: Dimension of the features.
        heads: See :meth:`swav.resnet50.PrototypeNetwork.add_heads`.
    """

    def __init__(self, backbone: nn.Module, embed_dim: int, **heads):
        super().__init__()
        self.backbone = backbone
        self.embed_dim = embed_dim
        self.add_heads(embed_dim, **heads)

    def forward_backbone(self, images: Tensor) -> Tensor:
        """Features (B, embed_dim) of images (B, C, H, W)."""
        features = self.backbone(images)
        return features[0] if isinstance(features, tuple) else features  # XCiT returns a tuple in train mode


class Trunk(nn.Module):
    """The features of a network without its heads, for evaluations; shares the network's weights."""

    def __init__(self, network: PrototypeNetwork):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.forward_backbone(images)


def available_architectures() -> list[str]:
    """Every name that :func:`build_network` accepts, our ResNets first."""
    return [*RESNETS, *sorted(library_architectures() - set(RESNETS))]


def build_network(
    arch: str,
    output_dim: int = 0,
    hidden_mlp: int = 0,
    nmb_prototypes: int | Sequence[int] = 0,
    normalize: bool = False,
    img_size: int = 224,
    in_chans: int = 3,
) -> PrototypeNetwork:
    """Build a randomly initialised network; without an ``output_dim`` it maps images to features (B, embed_dim).

    Args:
        arch: ``resnet50``, ``resnet50w2``, ``resnet50w4``, ``resnet50w5``, or a model of torchvision or timm.
        output_dim, hidden_mlp, nmb_prototypes, normalize: See :meth:`swav.resnet50.PrototypeNetwork.add_heads`.
        img_size: Side in pixels of the images for which position embeddings are made; convnets have none.
        in_chans: Channels of the images.

    Returns:
        The network, with an attribute ``embed_dim``.

    Raises:
        ValueError: If the name is unknown.
    """
    heads = {
        "output_dim": output_dim,
        "hidden_mlp": hidden_mlp,
        "nmb_prototypes": nmb_prototypes,
        "normalize": normalize,
    }
    if arch in RESNETS:
        return getattr(resnet50, arch)(in_chans=in_chans, **heads)
    backbone, embed_dim = build_library_backbone(arch, img_size=img_size, in_chans=in_chans, own_names=RESNETS)
    return LibraryNetwork(backbone, embed_dim, **heads)
