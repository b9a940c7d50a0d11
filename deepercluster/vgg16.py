"""VGG16 with batch normalisation behind a fixed Sobel filter, for images of any side and with any width.

The file needs torch alone. Names of the state dict are those of the official checkpoints.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # (channels over the width, convolutions); each ends with a pooling
CONVOLUTIONS = sum(number for _, number in STAGES)
OFFICIAL_WIDTH, OFFICIAL_SIZE = 64, 224


def map_side(image_size: int) -> int:
    """Side of the last map: images get a border of one pixel, and five poolings halve them."""
    return (image_size + 2) // 2 ** len(STAGES)


class VGG16(nn.Module):
    """Images (B, C, H, W) to the features that are clustered (B, 64 * width), or to scores.

    Args:
        sobel: Look at Sobel gradients of the channels' mean instead of colours.
        relu: End with a ReLU, as in fine-tuning. The features that are clustered are those before it.
        num_classes: Outputs of ``pred_layer``; 0: there is none.
        width: Channels of the first convolution, 64 in the paper; all others are multiples of it.
        img_size: Side of the images in pixels, at least 30; decides the input of the first linear layer.
        in_chans: C.
        folded: The Sobel filter is part of the first convolution, see :func:`fold_sobel`.
        last_side: Of the last map, instead of that of ``img_size``.
    """

    def __init__(
        self,
        sobel: bool = False,
        relu: bool = False,
        num_classes: int = 0,
        width: int = OFFICIAL_WIDTH,
        img_size: int = OFFICIAL_SIZE,
        in_chans: int = 3,
        folded: bool = False,
        last_side: int | None = None,
    ):
        super().__init__()
        self.img_size, self.in_chans, self.last_side = img_size, in_chans, last_side or map_side(img_size)
        if self.last_side < 1:
            raise ValueError(f"--image_size {img_size}: VGG16 takes images of at least 30 pixels")
        self.dim = 64 * width
        # with it the first convolution sees the same side: the filter has no padding of its own
        self.border = 2 if sobel or folded else 1
        self.sobel = sobel_filter(in_chans) if sobel else None
        self.body = nn.Module()
        self.body.features = convolutions(2 if sobel else in_chans, width, 5 if folded else 3)
        flat = STAGES[-1][0] * width * self.last_side**2
        layers = [nn.Linear(flat, self.dim), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(self.dim, self.dim)]
        self.body.classifier = nn.Sequential(*layers, *[nn.ReLU(inplace=True)] * relu)
        self.pred_layer = nn.Linear(self.dim, num_classes) if num_classes else None

    def maps(self, images: Tensor, conv: int = CONVOLUTIONS) -> Tensor:
        """Maps after the ReLU of convolution number ``conv``, from 1; of the last one after its pooling."""
        edges = F.pad(images, [self.border] * 4)
        if self.sobel is not None:
            edges = self.sobel(edges)
        return self.body.features[: after_relu(conv)](edges)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.body.features[-1](self.maps(images))  # the last pooling
        if maps.shape[2] != self.last_side or maps.shape[3] != self.last_side:
            raise ValueError(
                f"images of {images.shape[2]} x {images.shape[3]} pixels give maps of {maps.shape[2]} x "
                f"{maps.shape[3]}, the network takes {self.last_side} x {self.last_side}: see --image_size"
            )
        features = self.body.classifier(maps.flatten(1))
        return features if self.pred_layer is None else self.pred_layer(features)


def convolutions(in_chans: int, width: int, first_kernel: int = 3) -> nn.Sequential:
    """Configuration D with batch norms; weights from N(0, 2 / (9 outputs))."""
    layers: list[nn.Module] = []
    for multiple, number in STAGES:
        for _ in range(number):
            layer = nn.Conv2d(in_chans, multiple * width, 3 if layers else first_kernel, padding=1)
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (9 * layer.out_channels)))
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU(inplace=True)]
            in_chans = layer.out_channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def after_relu(conv: int) -> int:
    """How many layers of the convolutional part end with the ReLU of convolution number ``conv``, from 1."""
    if not 1 <= conv <= CONVOLUTIONS:
        raise ValueError(f"--conv {conv}: the convolutions of VGG16 are 1 to {CONVOLUTIONS}")
    ends = [sum(number for _, number in STAGES[: stage + 1]) for stage in range(len(STAGES))]
    return 3 * conv + sum(conv > end for end in ends)


def sobel_filter(in_chans: int = 3) -> nn.Sequential:
    """Frozen: the mean of the channels, then horizontal and vertical differences; a side loses two pixels."""
    grey, edges = nn.Conv2d(in_chans, 1, 1), nn.Conv2d(1, 2, 3)
    horizontal = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    with torch.no_grad():
        grey.weight.fill_(1 / in_chans)
        edges.weight.copy_(torch.stack([horizontal, horizontal.t()])[:, None])
        for layer in (grey, edges):
            layer.bias.zero_()
    return nn.Sequential(grey, edges).requires_grad_(False)


@torch.no_grad()
def fold_sobel(sobel: nn.Sequential, convolution: nn.Conv2d) -> nn.Conv2d:
    """The Sobel filter and the convolution (3 x 3) after it as one of 5 x 5 on colours, for fine-tuning.

    Its kernel at (a, b) is the sum over p + u = a, q + v = b and both gradients of convolution[p, q] * sobel[u, v],
    divided by the number of channels. It computes the same but at the outermost ring of pixels, where the convolution
    alone pads gradients with zeros.
    """
    grey, edges = sobel
    kernel = F.conv_transpose2d(convolution.weight, edges.weight)  # (outputs, 1, 5, 5): the two kernels convolved
    folded = nn.Conv2d(grey.in_channels, convolution.out_channels, 5, padding=1)
    folded.weight.copy_(kernel * grey.weight.transpose(0, 1).view(1, -1, 1, 1))
    folded.bias.copy_(convolution.bias)
    return folded


def without_sobel(network: VGG16) -> VGG16:
    """The network with :func:`fold_sobel` done, in place; one without the filter stays as it is."""
    if network.sobel is not None:
        network.body.features[0] = fold_sobel(network.sobel, network.body.features[0])
        network.sobel = None
    return network
