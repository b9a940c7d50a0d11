"""What the convolutional layers of a trained network see: their maps, layer by layer."""

from torch import Tensor, nn

from .networks import ClusterNetwork


def check_conv(network: ClusterNetwork, conv: int) -> None:
    """Raise ``ValueError`` unless the network has a layer number ``conv``, from 1."""
    layers = len(_activations(network) or _stages(network))
    if not 1 <= conv <= layers:
        raise ValueError(f"--conv {conv}: the network has the layers 1 to {layers}" if layers else
                         f"--conv {conv}: the network has no convolutional layers")  # fmt: skip


def conv_maps(network: ClusterNetwork, images: Tensor, conv: int, before_relu: bool = False) -> Tensor:
    """Maps (B, C, H, W) of layer number ``conv``, from 1.

    In AlexNet and VGG16 these are the convolutions, each with its batch normalisation and ReLU. In networks of
    torchvision and timm they are the parts with convolutions that follow each other: those of a ResNet are its first
    convolution and its four stages.

    Args:
        images: Normalised, (B, 3, H, W).
        before_relu: In AlexNet and VGG16, leave out the last ReLU.
    """
    check_conv(network, conv)
    if places := _activations(network):
        last = places[conv - 1]
        maps = images if network.sobel is None else network.sobel(images)
        return network.features[: last if before_relu else last + 1](maps)
    outputs: list[Tensor] = []
    stage = _stages(network)[conv - 1]
    handle = stage.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        network.maps(images)
    finally:
        handle.remove()
    if outputs[0].dim() != 4:
        raise ValueError(f"--conv {conv}: the output of this layer is no map but of shape {tuple(outputs[0].shape)}")
    return outputs[0]


def _activations(network: ClusterNetwork) -> list[int]:
    """Places of the ReLUs in the convolutional part of the paper's networks; none in other networks."""
    if not isinstance(network.features, nn.Sequential):
        return []
    return [place for place, layer in enumerate(network.features) if isinstance(layer, nn.ReLU)]


def _stages(network: ClusterNetwork) -> list[nn.Module]:
    return [child for child in network.features.children() if any(isinstance(m, nn.Conv2d) for m in child.modules())]
