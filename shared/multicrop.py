"""Multi-crop views and the wrapper that runs them through a network in as few passes as possible."""

import torch
from torch import Tensor, nn


class MultiCropWrapper(nn.Module):
    """A backbone and a head for views of several resolutions.

    Consecutive inputs of equal size are joined on the batch axis and share one pass through the backbone; a
    backbone with ``packs_resolutions = True`` (our ViTs) takes all groups in a single pass. The features of all views
    are joined crop-major (every image of view 0, then of view 1, ...) and go through the head once.

    Args:
        backbone: Maps (B, C, H, W) to features (B, D). ``fc`` and ``head`` are replaced by ``nn.Identity``.
        head: Maps features (V * B, D) to outputs (V * B, K).
    """

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        backbone.fc, backbone.head = nn.Identity(), nn.Identity()
        self.backbone = backbone
        self.head = head

    def embed(self, views: Tensor | list[Tensor]) -> Tensor:
        """Backbone features of all views, crop-major, shape (V * B, D), float32."""
        if isinstance(views, Tensor):
            views = [views]
        groups: list[list[Tensor]] = []
        for view in views:
            if groups and groups[-1][0].shape[-2:] == view.shape[-2:]:
                groups[-1].append(view)
            else:
                groups.append([view])
        batches = [torch.cat(group) if len(group) > 1 else group[0] for group in groups]
        if len(batches) > 1 and getattr(self.backbone, "packs_resolutions", False):
            return self.backbone(batches).float()
        features = [self.backbone(batch) for batch in batches]
        # XCiT returns (features, ...) in train mode
        features = [f[0] if isinstance(f, tuple) else f for f in features]
        return torch.cat([f.float() for f in features])

    def forward(self, views: Tensor | list[Tensor]) -> Tensor:
        """Head outputs of all views, crop-major, shape (V * B, K)."""
        return self.head(self.embed(views))
