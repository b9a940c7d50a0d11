"""The networks of DeepCluster: AlexNet and VGG16 with batch normalisation, behind a fixed Sobel filter.

The file needs torch alone. Names of the state dict are those of the official checkpoints.
"""

import math

import torch
from torch import Tensor, nn

# (output channels, kernel, stride, padding) of a convolution; "M" is a max-pooling
ALEXNET = [(96, 11, 4, 2), "M", (256, 5, 1, 2), "M", (384, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1), "M"]
VGG16 = [
    layer
    for channels, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    for layer in (*[(channels, 3, 1, 1)] * convolutions, "M")
]
HIDDEN = 4096


class ClusterNetwork(nn.Module):
    """Convolutions, fully connected layers and a top layer with one output per cluster.

    Args:
        features: Maps images (B, C, H, W) to maps or features.
        classifier: Maps them, flattened, to features (B, D). Its last layer is a ReLU, or it is empty.
        dim: D.
        sobel: Whether images go through :func:`sobel_filter` first; ``features`` then takes 2 channels.
        out: Outputs of the top layer; None for no top layer.
        img_size: Side in pixels of the images that it was made for.
        in_chans: Channels C of these images.
    """

    def __init__(
        self,
        features: nn.Module,
        classifier: nn.Sequential,
        dim: int,
        sobel: bool = False,
        out: int | None = None,
        img_size: int = 224,
        in_chans: int = 3,
    ):
        super().__init__()
        self.img_size, self.in_chans = img_size, in_chans
        self.features = features
        self.classifier = classifier
        self.dim = dim
        self.top_layer = None if out is None else new_top_layer(dim, out)
        self.sobel = sobel_filter(in_chans) if sobel else None

    def maps(self, images: Tensor) -> Tensor:
        """What the convolutional part makes of normalised images (B, C, H, W)."""
        return self.features(images if self.sobel is None else self.sobel(images))

    def embed(self, images: Tensor) -> Tensor:
        """The features that are clustered, (B, D): those before the last ReLU."""
        return self.classifier[:-1](self.maps(images).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the clusters (B, K); without a top layer its input (B, D)."""
        hidden = self.classifier(self.maps(images).flatten(1))
        return hidden if self.top_layer is None else self.top_layer(hidden)


def sobel_filter(in_chans: int = 3) -> nn.Sequential:
    """Frozen: the mean of the channels, then horizontal and vertical differences (C to 2 channels, same size)."""
    grey = nn.Conv2d(in_chans, 1, kernel_size=1)
    nn.init.constant_(grey.weight, 1 / in_chans)
    edges = nn.Conv2d(1, 2, kernel_size=3, padding=1)
    horizontal = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    with torch.no_grad():
        edges.weight.copy_(torch.stack([horizontal, horizontal.t()])[:, None])
    for convolution in (grey, edges):
        nn.init.zeros_(convolution.bias)
    return nn.Sequential(grey, edges).requires_grad_(False)


def new_top_layer(dim: int, num_clusters: int, seed: int | None = None) -> nn.Linear:
    """A linear layer with weights from N(0, 0.01^2), drawn from ``seed`` if there is one, and biases 0."""
    layer = nn.Linear(dim, num_clusters)
    generator = None if seed is None else torch.Generator().manual_seed(seed % 2**63)
    with torch.no_grad():
        layer.weight.normal_(0, 0.01, generator=generator)
        layer.bias.zero_()
    return layer


def alexnet(
    sobel: bool = False, bn: bool = True, out: int | None = 1000, img_size: int = 224, in_chans: int = 3
) -> ClusterNetwork:
    """AlexNet in one tower, with batch normalisation after every convolution (Caron et al. 2018, section 3.2).

    Args:
        sobel: Whether it looks at Sobel gradients instead of colours.
        bn: Whether there is batch normalisation.
        out: Outputs of the top layer; None for no top layer.
        img_size: Side of the images in pixels, at least 63; fixes the input of the first linear layer.
        in_chans: Channels of the images.

    Raises:
        ValueError: If the images are too small.
    """
    pool = (3, 2)
    flat = ALEXNET[-2][0] * _map_side(ALEXNET, pool, img_size, "alexnet") ** 2
    classifier = nn.Sequential(
        nn.Dropout(0.5),
        nn.Linear(flat, HIDDEN),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(inplace=True),
    )
    features = _convolutions(ALEXNET, pool, 2 if sobel else in_chans, bn)
    return _initialized(features, classifier, sobel, out, img_size, in_chans)


def vgg16(
    sobel: bool = False, bn: bool = True, out: int | None = 1000, img_size: int = 224, in_chans: int = 3
) -> ClusterNetwork:
    """VGG16 (configuration D); arguments and errors as :func:`alexnet`, images of at least 32 pixels."""
    pool = (2, 2)
    flat = VGG16[-2][0] * _map_side(VGG16, pool, img_size, "vgg16") ** 2
    classifier = nn.Sequential(
        nn.Linear(flat, HIDDEN),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(inplace=True),
    )
    features = _convolutions(VGG16, pool, 2 if sobel else in_chans, bn)
    return _initialized(features, classifier, sobel, out, img_size, in_chans)


def _convolutions(plan: list, pool: tuple[int, int], in_channels: int, bn: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for item in plan:
        if item == "M":
            layers.append(nn.MaxPool2d(*pool))
            continue
        channels, kernel, stride, padding = item
        layers.append(nn.Conv2d(in_channels, channels, kernel, stride, padding))
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)] if bn else [nn.ReLU(inplace=True)]
        in_channels = channels
    return nn.Sequential(*layers)


def _map_side(plan: list, pool: tuple[int, int], img_size: int, name: str) -> int:
    """Side of the last map."""
    side = img_size
    for item in plan:
        kernel, stride, padding = (*pool, 0) if item == "M" else item[1:]
        side = (side + 2 * padding - kernel) // stride + 1
        if side < 1:
            raise ValueError(f"images of {img_size} pixels are too small for {name}; raise --crop_size")
    return side


def _initialized(
    features: nn.Sequential, classifier: nn.Sequential, sobel: bool, out: int | None, img_size: int, in_chans: int
) -> ClusterNetwork:
    for module in (*features, *classifier):
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            nn.init.normal_(module.weight, std=math.sqrt(2 / (height * width * module.out_channels)))
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    return ClusterNetwork(features, classifier, HIDDEN, sobel, out, img_size, in_chans)


# --- Maps of a layer --------------------------------------------------------------------------------------------------


def check_conv(network: ClusterNetwork, conv: int) -> None:
    """Raise ``ValueError`` unless the network has a layer number ``conv``, from 1."""
    layers = len(_activations(network) or _stages(network))
    if not 1 <= conv <= layers:
        there = f"the layers 1 to {layers}" if layers else "no convolutional layers"
        raise ValueError(f"--conv {conv}: the network has {there}")


def conv_maps(network: ClusterNetwork, images: Tensor, conv: int, before_relu: bool = False) -> Tensor:
    """Maps (B, C, H, W) of layer number ``conv``, from 1.

    In AlexNet and VGG16 these are the convolutions, each with its batch normalisation and ReLU. In networks of
    torchvision and timm they are the parts with convolutions that follow each other: those of a ResNet are its first
    convolution and its four stages.

    Args:
        images: Normalised, (B, C, H, W).
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
