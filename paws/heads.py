"""PAWS's heads, and running views of several sizes through a backbone that has them. Needs torch only."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn


def projection_head(embed_dim: int, output_dim: int) -> nn.Sequential:
    """Three linear layers with batch norms between them and none at the end: features (N, D) to (N, output_dim)."""
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(embed_dim, embed_dim),
            bn1=nn.BatchNorm1d(embed_dim),
            relu1=nn.ReLU(inplace=True),
            fc2=nn.Linear(embed_dim, embed_dim),
            bn2=nn.BatchNorm1d(embed_dim),
            relu2=nn.ReLU(inplace=True),
            fc3=nn.Linear(embed_dim, output_dim),
        )
    )


def prediction_head(output_dim: int) -> nn.Sequential:
    """A batch norm, then a bottleneck of a quarter of the width: (N, output_dim) to (N, output_dim)."""
    return nn.Sequential(
        OrderedDict(
            bn1=nn.BatchNorm1d(output_dim),
            fc1=nn.Linear(output_dim, output_dim // 4),
            bn2=nn.BatchNorm1d(output_dim // 4),
            relu=nn.ReLU(inplace=True),
            fc2=nn.Linear(output_dim // 4, output_dim),
        )
    )


def classification_head(embed_dim: int, num_classes: int) -> nn.Sequential:
    """What fine-tuning puts in place of the projection head, whose first layers it takes over."""
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(embed_dim, embed_dim),
            bn1=nn.BatchNorm1d(embed_dim),
            relu1=nn.ReLU(inplace=True),
            fc2=nn.Linear(embed_dim, num_classes),
        )
    )


class Encoder(nn.Module):
    """A backbone, its projection head ``fc`` and optionally a prediction head ``pred``.

    The next base class of a subclass is the backbone. The heads come last, so that the parameters are in the order of
    the released optimiser states.

    Args:
        backbone: What the backbone is made of; it has an ``embed_dim``.
        output_dim: Dimension of the representations; 0: no heads, which makes representations of features.
        use_pred_head: Also make the prediction head.
    """

    def __init__(self, *backbone, output_dim: int = 0, use_pred_head: bool = False):
        super().__init__(*backbone)
        self.fc = projection_head(self.embed_dim, output_dim) if output_dim else None
        self.pred = prediction_head(output_dim) if output_dim and use_pred_head else None

    def forward_backbone(self, images: Tensor) -> Tensor:
        """Features (B, embed_dim) of images (B, C, H, W)."""
        return super().forward(images)

    def forward(self, views: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Run views through backbone and heads, one pass for each run of views of equal size.

        Batch norms therefore see supports and large views together, and the small views apart, in the heads too.

        Args:
            views: One batch, or several (V_i * B, C, H_i, W_i).

        Returns:
            Representations ``h`` (N, output_dim) after ``fc`` and ``z`` after ``pred`` (``h`` itself without one), in
            the order of the views.
        """
        projected, predicted = [], []
        for _, same_size in groupby([views] if isinstance(views, Tensor) else views, lambda view: view.shape[-1]):
            first, *others = same_size
            h = self.forward_backbone(torch.cat([first, *others]) if others else first)
            h = h if self.fc is None else self.fc(h)
            projected.append(h)
            predicted.append(h if self.pred is None else self.pred(h))
        return torch.cat(projected), torch.cat(predicted)
