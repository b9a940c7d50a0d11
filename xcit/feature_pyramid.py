"""XCiT's trunk as the backbone of dense tasks: feature maps of strides 4, 8, 16 and 32 (section 4.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shared import distributed
from shared.networks.weights import CLASSIFIERS, WeightMismatch

from .cross_covariance_transformer import Trunk, architecture
from .hub import read_weights

NOT_OF_THE_TRUNK = ("cls_token", "cls_attn_blocks", "norm", *CLASSIFIERS)


class FeaturePyramid(Trunk):
    """The trunk without class attention, norm and head; the tokens of four blocks at four resolutions.

    Names are those of the published detectors' and segmenters' backbones.

    Args:
        out_indices: Blocks whose tokens become the maps of strides 4, 8, 16 and 32, from 0.
        trunk: Arguments of :class:`xcit.cross_covariance_transformer.Trunk`.
    """

    def __init__(self, out_indices: Sequence[int], **trunk):
        super().__init__(**trunk)
        if len(out_indices) != 4:
            raise ValueError(f"out_indices {out_indices}: a pyramid has four levels")
        self.out_indices = list(out_indices)
        dim = self.embed_dim
        if self.patch_size == 16:
            self.fpn1 = nn.Sequential(twice(dim), nn.BatchNorm2d(dim), nn.GELU(), twice(dim))
            self.fpn2 = nn.Sequential(twice(dim))
            self.fpn3 = nn.Identity()
            self.fpn4 = nn.MaxPool2d(2)
        else:
            self.fpn1 = nn.Sequential(twice(dim))
            self.fpn2 = nn.Identity()
            self.fpn3 = nn.MaxPool2d(2)
            self.fpn4 = nn.MaxPool2d(4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps (B, D, H / stride, W / stride) under ``"0"`` to ``"3"``, the finest first."""
        x, (rows, columns) = self.embed(images)
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x, rows, columns)
            maps += [x.transpose(1, 2).unflatten(2, (rows, columns))] * self.out_indices.count(index)
        levels = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return {str(i): level(features) for i, (level, features) in enumerate(zip(levels, maps, strict=True))}


def twice(dim: int) -> nn.ConvTranspose2d:
    """A learnt doubling of height and width."""
    return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)


def build_pyramid(model: str, drop_path_rate: float = 0.0) -> FeaturePyramid:
    """The pyramid of a published network, whose blocks are tapped where the published detectors tap them."""
    options = architecture(model)
    options.pop("tokens_norm", None)
    depth = options["depth"]
    taps = [3, 5, 7, 11] if depth == 12 else [7, 11, 15, 23] if depth == 24 else torch.linspace(0, depth - 1, 4).int()
    return FeaturePyramid([int(tap) for tap in taps], drop_path_rate=drop_path_rate, **options)


def fill_trunk(pyramid: FeaturePyramid, pretrained: str) -> None:
    """Take the trunk of a classifier or of a DINO backbone; the levels of the pyramid stay as they are.

    Args:
        pretrained: See :func:`xcit.hub.read_weights`.

    Raises:
        WeightMismatch: If the file does not fill the trunk, has further blocks or holds values that are not finite.
    """
    tensors, target = read_weights(pretrained), pyramid.state_dict()
    trunk = {name for name in target if not name.startswith("fpn")}
    wrong = [n for n in sorted(trunk) if n not in tensors or tensors[n].shape != target[n].shape]
    wrong += [n for n in tensors if n not in trunk and n.split(".")[0] not in NOT_OF_THE_TRUNK]
    if wrong:
        raise WeightMismatch(f"--pretrained {pretrained} does not fill the trunk: {', '.join(wrong[:5])}")
    if (bad := next((n for n in sorted(trunk) if not tensors[n].isfinite().all()), None)) is not None:
        raise WeightMismatch(f"--pretrained {pretrained}: {bad} holds values that are not finite")
    pyramid.load_state_dict(target | {name: tensors[name] for name in trunk})
    distributed.print_once(f"{pretrained}: {len(trunk)}/{len(trunk)} entries of the trunk loaded")
