"""ResNet-50, also two, four and five times as wide, with SwAV's projection head and prototypes.

Needs torch only, so that the file can be lifted out alone. The trunk's weights are named as in torchvision's
``resnet50``; the released weights of SwAV and DeepCluster-v2 load into it.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiPrototypes(nn.Module):
    """Several sets of prototypes, each a linear layer without bias.

    Args:
        output_dim: D, dimension of the embeddings.
        nmb_prototypes: K of each set.
    """

    def __init__(self, output_dim: int, nmb_prototypes: Sequence[int]):
        super().__init__()
        self.nmb_heads = len(nmb_prototypes)
        for i, k in enumerate(nmb_prototypes):
            self.add_module(f"prototypes{i}", nn.Linear(output_dim, k, bias=False))

    def heads(self) -> list[nn.Linear]:
        """The sets, in order."""
        return [getattr(self, f"prototypes{i}") for i in range(self.nmb_heads)]

    def forward(self, embeddings: Tensor) -> list[Tensor]:
        """Scores of embeddings (N, D): one (N, K) matrix per set."""
        return [head(embeddings) for head in self.heads()]


class PrototypeNetwork(nn.Module):
    """A trunk followed by a projection head and prototypes; subclasses define :meth:`forward_backbone`.

    Attributes:
        projection_head: Maps features to embeddings, or None.
        prototypes: Maps embeddings to their scores with the prototypes, or None.
    """

    def add_heads(
        self,
        embed_dim: int,
        output_dim: int = 0,
        hidden_mlp: int = 0,
        nmb_prototypes: int | Sequence[int] = 0,
        normalize: bool = False,
    ) -> None:
        """Make the layers behind the trunk; call last in ``__init__``, so that the order of parameters stays.

        Args:
            embed_dim: Dimension of the trunk's features.
            output_dim: D, dimension of the embeddings; 0 for no projection head.
            hidden_mlp: Hidden width of the head; 0 for a linear one.
            nmb_prototypes: K, or one for each of several sets; 0 for no prototypes.
            normalize: Put the embeddings on the unit sphere.
        """
        self.normalize = normalize
        if output_dim == 0:
            self.projection_head = None
        elif hidden_mlp == 0:
            self.projection_head = nn.Linear(embed_dim, output_dim)
        else:
            self.projection_head = nn.Sequential(
                nn.Linear(embed_dim, hidden_mlp),
                nn.BatchNorm1d(hidden_mlp),
                nn.ReLU(inplace=True),
                nn.Linear(hidden_mlp, output_dim),
            )
        if isinstance(nmb_prototypes, Sequence):
            self.prototypes = MultiPrototypes(output_dim, nmb_prototypes)
        elif nmb_prototypes > 0:
            self.prototypes = nn.Linear(output_dim, nmb_prototypes, bias=False)
        else:
            self.prototypes = None

    def forward_backbone(self, images: Tensor) -> Tensor:
        """Features (B, embed_dim) of images (B, C, H, W)."""
        raise NotImplementedError

    def forward_head(self, features: Tensor) -> Tensor | tuple[Tensor, Tensor | list[Tensor]]:
        """Embeddings of features, and with prototypes their scores too."""
        embeddings = features if self.projection_head is None else self.projection_head(features)
        # in the type of the weights, also under autocast: division by an epsilon of 0.05 magnifies rounding
        dtype = next(self.parameters()).dtype
        with torch.autocast(embeddings.device.type, enabled=False):
            if self.normalize:
                embeddings = F.normalize(embeddings.to(dtype), dim=1)
            if self.prototypes is None:
                return embeddings
            return embeddings, self.prototypes(embeddings.to(dtype))

    def forward(self, views: Tensor | Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor | list[Tensor]]:
        """Run views of several sizes through the trunk, one pass per size, and once through the head.

        Args:
            views: One batch, or a list of batches (V_i * B, C, H_i, W_i). Consecutive ones of equal width are joined,
                so batch norms see all images of one resolution together.

        Returns:
            Embeddings (V * B, D), crop-major (all images of the first view, then of the second, ...); with prototypes
            also the scores (V * B, K), a list of them for several sets. Normalised embeddings have the type of the
            weights, under autocast too.
        """
        if isinstance(views, Tensor):
            views = [views]
        groups: list[list[Tensor]] = []
        for view in views:
            if groups and groups[-1][0].shape[-1] == view.shape[-1]:
                groups[-1].append(view)
            else:
                groups.append([view])
        batches = [torch.cat(group) if len(group) > 1 else group[0] for group in groups]
        return self.forward_head(torch.cat([self.forward_backbone(batch) for batch in batches]))


class LibraryNetwork(PrototypeNetwork):
    """A backbone of another library with the same projection head and prototypes.

    Args:
        backbone: Maps images (B, C, H, W) to features (B, embed_dim).
        embed_dim: Dimension of the features.
        heads: See :meth:`PrototypeNetwork.add_heads`.
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


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut; the 3x3 one has the stride.

    Args:
        inplanes: Channels of the input.
        planes: A quarter of the channels of the output.
        width: Channels of the 3x3 convolution.
        stride: Of the 3x3 convolution and of the shortcut.
    """

    expansion = 4

    def __init__(self, inplanes: int, planes: int, width: int, stride: int = 1):
        super().__init__()
        outplanes = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inplanes != outplanes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


class ResNet(PrototypeNetwork):
    """A ResNet of bottleneck blocks with a projection head and prototypes.

    Args:
        layers: Blocks in each of the four stages.
        widen: Factor of the width of every stage.
        width_per_group: Channels of the stem for ``widen`` 1; 64 in every published network.
        eval_mode: :meth:`forward_backbone` returns the feature map (B, C, H / 32, W / 32) before the pooling.
        in_chans: Channels of the images.
        output_dim, hidden_mlp, nmb_prototypes, normalize: See :meth:`PrototypeNetwork.add_heads`.

    Attributes:
        embed_dim: Dimension of the features, 2048 * ``widen``.
    """

    def __init__(
        self,
        layers: Sequence[int],
        widen: int = 1,
        width_per_group: int = 64,
        normalize: bool = False,
        output_dim: int = 0,
        hidden_mlp: int = 0,
        nmb_prototypes: int | Sequence[int] = 0,
        eval_mode: bool = False,
        in_chans: int = 3,
    ):
        super().__init__()
        self.eval_mode = eval_mode
        planes = width_per_group * widen
        self.conv1 = nn.Conv2d(in_chans, planes, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inplanes = planes
        for stage, blocks in enumerate(layers):
            stage_planes = planes * 2**stage
            width = stage_planes * width_per_group // 64
            stride = 1 if stage == 0 else 2
            stage_layers = []
            for block in range(blocks):
                stage_layers.append(Bottleneck(inplanes, stage_planes, width, stride if block == 0 else 1))
                inplanes = stage_planes * Bottleneck.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stage_layers))
        self.embed_dim = inplanes
        self.add_heads(inplanes, output_dim, hidden_mlp, nmb_prototypes, normalize)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_backbone(self, images: Tensor) -> Tensor:
        """Features (B, embed_dim) of images (B, C, H, W); in eval mode the map (B, embed_dim, H / 32, W / 32)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x if self.eval_mode else x.mean(dim=(2, 3))


# The published networks: features and parameters without heads.
resnet50 = partial(ResNet, [3, 4, 6, 3])  # 2048, 23.5 million
resnet50w2 = partial(ResNet, [3, 4, 6, 3], widen=2)  # 4096, 93.9 million
resnet50w4 = partial(ResNet, [3, 4, 6, 3], widen=4)  # 8192, 375 million
resnet50w5 = partial(ResNet, [3, 4, 6, 3], widen=5)  # 10240, 586 million
