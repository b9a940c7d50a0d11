"""ResNets of bottleneck blocks (50 to 200 layers, also two and four times as wide), without heads. Needs torch only.

Names are those of torchvision's networks; the released weights of PAWS load into them.
"""

from collections.abc import Sequence

from torch import Tensor, nn

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut; the 3x3 one has the stride."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int = 1):
        super().__init__()
        out_planes = planes * self.expansion
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_planes != out_planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_planes, out_planes, 1, stride, bias=False), nn.BatchNorm2d(out_planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


class ResNet(nn.Module):
    """Images (B, C, H, W) to features (B, embed_dim).

    Args:
        layers: Blocks in each of the four stages.
        widen: Factor of every number of channels, the stem's too.
        in_chans: Channels of the images.
        base_planes: Channels of the stem for ``widen`` 1; 64 in every published network.
    """

    def __init__(self, layers: Sequence[int] = BLOCKS[50], widen: int = 1, in_chans: int = 3, base_planes: int = 64):
        super().__init__()
        in_planes = base_planes * widen
        self.conv1 = nn.Conv2d(in_chans, in_planes, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for stage, blocks in enumerate(layers):
            planes = base_planes * widen * 2**stage
            stage_layers = []
            for block in range(blocks):
                stage_layers.append(Bottleneck(in_planes, planes, 2 if stage > 0 and block == 0 else 1))
                in_planes = planes * Bottleneck.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stage_layers))
        self.embed_dim = in_planes
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))
