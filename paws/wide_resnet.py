"""Wide ResNets for small images (Zagoruyko and Komodakis 2016) as PAWS has them, without heads. Needs torch only."""

import torch.nn.functional as F
from torch import Tensor, nn


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each after a batch norm and a ReLU; the second one has the stride.

    The shortcut is the block's input as it is, or a 1x1 convolution of it where the shape changes.
    """

    def __init__(self, in_planes: int, planes: int, stride: int = 1):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + self.shortcut(x)


class WideResNet(nn.Module):
    """Images (B, C, H, W) to features (B, embed_dim = 64 * widen). All convolutions have biases.

    Args:
        depth: Layers: 6 n + 4 for n blocks in each of the three stages.
        widen: Factor of the channels 16, 32, 64 of the stages.
        in_chans: Channels of the images.
    """

    def __init__(self, depth: int = 28, widen: int = 2, in_chans: int = 3):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"a wide ResNet has 6 n + 4 layers, not {depth}")
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1)
        in_planes = 16
        for stage in range(3):
            planes = 16 * widen * 2**stage
            blocks = []
            for block in range((depth - 4) // 6):
                blocks.append(PreActivationBlock(in_planes, planes, 2 if stage > 0 and block == 0 else 1))
                in_planes = planes
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.bn1 = nn.BatchNorm2d(in_planes, momentum=0.99)  # nearly the statistics of the last batch alone
        self.embed_dim = in_planes

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        return F.relu(self.bn1(x)).mean(dim=(2, 3))
