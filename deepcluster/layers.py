"""What the convolutional layers of a trained network see: their maps, layer by layer."""

from torch import Tensor, nn

from .networks import ClusterNetwork


def check_conv(network: ClusterNetwork, conv: int) -> None:
    """Raise ``ValueError`` unless the network has a convolution number ``conv``, from 1, followed by a ReLU."""
    layers = _activations(network)
    if not layers:
        raise ValueError(f"--conv {conv}: only alexnet and vgg16 have numbered layers")
    if not 1 <= conv <= len(layers):
        raise ValueError(f"--conv {conv}: the network has layers 1 to {len(layers)}")


def conv_maps(network: ClusterNetwork, images: Tensor, conv: int, before_relu: bool = False) -> Tensor:
    """Maps (B, C, H, W) of convolution number ``conv`` (from 1) after batch normalisation and ReLU.

    Args:
        images: Normalised, (B, 3, H, W).
        before_relu: Leave out the last ReLU.
    """
    check_conv(network, conv)
    last = _activations(network)[conv - 1]
    maps = images if network.sobel is None else network.sobel(images)
    return network.features[: last if before_relu else last + 1](maps)


def _activations(network: ClusterNetwork) -> list[int]:
    """Places of the ReLUs in the convolutional part of the paper's networks."""
    if not isinstance(network.features, nn.Sequential):
        return []
    return [place for place, layer in enumerate(network.features) if isinstance(layer, nn.ReLU)]
