"""Multi-crop views of a data set, and the wrapper that runs them through a network in as few passes as possible."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .images.loading import BadImages
from .images.sources import ImageSource
from .images.views import (
    DrawStreams,
    ViewParams,
    ViewRecipe,
    apply_channels,
    apply_fast,
    apply_pil,
    draw_view,
    without_colours,
)
from .run.randomness import derive_seed

__all__ = ["MultiCropDataset", "MultiCropWrapper", "ViewRecipe", "normalize_views"]


class MultiCropDataset(Dataset):
    """Batches of random views; every draw is a function of (seed, epoch, index).

    An item's key is (epoch, index), and the loader fetches a whole batch at once (``__getitems__``): consecutive
    recipes of equal size share one uint8 tensor, into which their views are written in place.

    Args:
        source: The images; the views of those that are no RGB are float32 and normalised.
        recipes: One per view.
        backend: ``fast``, or ``pil`` for torchvision's PIL operations.
        in_chans: Channels of the views: 3, or 1 for the luminance; for images that are no RGB the source says it.
        bad_images: Policy for images that cannot be read; by default they are replaced.
    """

    def __init__(
        self,
        source: ImageSource,
        recipes: Sequence[ViewRecipe],
        seed: int = 0,
        backend: str = "fast",
        in_chans: int = 3,
        bad_images: BadImages | None = None,
    ):
        if backend not in ("fast", "pil"):
            raise ValueError(f"--augmentation {backend!r} is neither fast nor pil")
        self.channels = source.channels
        if self.channels is not None:
            in_chans = self.channels.number
            if backend == "pil":
                raise ValueError("--augmentation pil: Pillow knows colours only; images of other channels take fast")
        elif in_chans not in (1, 3):
            raise ValueError(f"--in_chans {in_chans} is neither 1 nor 3, as for images in RGB")
        self.source, self.recipes, self.seed = source, list(recipes), seed
        self.backend, self.in_chans = backend, in_chans
        self.bad_images = bad_images or BadImages(len(source))
        self.groups: list[list[ViewRecipe]] = []
        for recipe in self.recipes:
            if self.groups and self.groups[-1][-1].size_px == recipe.size_px:
                self.groups[-1].append(recipe)
            else:
                self.groups.append([recipe])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], Tensor, Tensor]:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Views, labels and indices of a batch.

        Returns:
            One tensor per group of equal size, uint8 for RGB, (views in the group * B, C, size, size), crop-major (all
            images of its first view, then of its second, ...) and channels-last in memory; labels (B,), -1 where there
            are none; indices (B,), those of the replacements for images that cannot be read.
        """
        dtype = np.uint8 if self.channels is None else np.float32
        batches = [
            np.empty((len(group), len(keys), group[0].size_px, group[0].size_px, self.in_chans), dtype)
            for group in self.groups
        ]
        indices = []
        for position, (epoch, index) in enumerate(keys):
            slots = [view for batch in batches for view in batch[:, position]]
            key = (self.seed, epoch, index)
            indices.append(
                self.bad_images.read(
                    self.source, index, key, lambda i, key=key, slots=slots: self._write(i, key, slots)
                )
            )
        views = [torch.from_numpy(batch).flatten(0, 1).permute(0, 3, 1, 2) for batch in batches]
        labels = torch.tensor([self.source.label(index) for index in indices])
        return views, labels, torch.tensor(indices)

    def draw(self, height: int, width: int, key: tuple[int, int, int]) -> list[ViewParams]:
        """Parameters of all views of an image of this size for ``key`` = (seed, epoch, index)."""
        streams = DrawStreams(derive_seed(*key, 0), derive_seed(*key, 1))
        views = [draw_view(recipe, height, width, streams) for recipe in self.recipes]
        return views if self.channels is None else [without_colours(view) for view in views]

    def _write(self, index: int, key: tuple[int, int, int], slots: list[np.ndarray]) -> int:
        """Write the views of image ``index`` into ``slots``; the image is decoded once."""
        image = self.source.load(index)
        views = self.draw(image.height, image.width, key)
        if self.backend == "pil":
            pixels = image.decode()
            for view, recipe, slot in zip(views, self.recipes, slots, strict=True):
                apply_pil(pixels, view, recipe, slot)
            return index
        pixels = image.decode(_allowed_reduction(views, self.recipes))
        scale = pixels.shape[0] / image.height, pixels.shape[1] / image.width
        with torch.inference_mode():  # spares ten calls to torch a fifth of their overhead
            for view, recipe, slot in zip(views, self.recipes, slots, strict=True):
                if self.channels is None:
                    apply_fast(pixels, view, recipe, slot, scale)
                else:
                    apply_channels(pixels, view, recipe, slot, self.channels.limits)
        return index


def _allowed_reduction(views: Sequence[ViewParams], recipes: Sequence[ViewRecipe]) -> int:
    """Largest of 1, 2, 4, 8 by which the image may shrink with every crop still twice as large as its view.

    At once the size of the view, views of photographs lose up to 5 % of their high frequencies; at twice it, 2 %.
    """
    shrink = min(min(v.height, v.width) / (2 * r.size_px) for v, r in zip(views, recipes, strict=True))
    return next(reduction for reduction in (8, 4, 2, 1) if reduction <= max(shrink, 1))


def normalize_views(
    views: Sequence[Tensor],
    device: torch.device | str,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Move uint8 views to the device and normalise them there: (x / 255 - mean) / std.

    They are laid out channels-last, in which convolutions, and what follows them, are faster.

    Args:
        views: Each (V * B, C, H, W): uint8, or float when they are normalised already.
        mean, std: Per channel, for pixels in [0, 1]; views of one channel take the averages over the channels.
        dtype: Of the result; computed in float32.
    """
    if views[0].is_floating_point():
        return [channels_last(view.to(device, dtype, non_blocking=True)) for view in views]
    mean, std = torch.tensor(mean), torch.tensor(std)
    if views[0].shape[1] == 1:
        mean, std = mean.mean(dim=0, keepdim=True), std.mean(dim=0, keepdim=True)
    shift = (-mean / std).view(1, -1, 1, 1).to(device, non_blocking=True)
    scale = (1 / (255 * std)).view(1, -1, 1, 1).to(device, non_blocking=True)
    normalized = []
    for view in views:
        pixels = view.to(device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
        torch.addcmul(shift, pixels, scale, out=pixels)  # one pass, in place: new memory costs more than arithmetic
        normalized.append(pixels.to(dtype))
    return normalized


def channels_last(images: Tensor) -> Tensor:
    """The same images (B, C, H, W), the channels of a pixel next to each other in memory; all else as it is."""
    if not (isinstance(images, Tensor) and images.dim() == 4):
        return images
    return images.contiguous(memory_format=torch.channels_last)


class MultiCropWrapper(nn.Module):
    """A backbone and a head for views of several resolutions.

    Consecutive inputs of equal size are joined on the batch axis and share one pass through the backbone; a
    backbone with ``packs_resolutions = True`` (our ViTs) takes all groups in a single pass. The features of all views
    are joined crop-major (every image of view 0, then of view 1, ...) and go through the head once.

    Args:
        backbone: Maps (B, C, H, W) to features (B, D). A linear ``fc`` or ``head`` is replaced by ``nn.Identity``.
        head: Maps features (V * B, D) to outputs (V * B, K).
    """

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        for name in ("fc", "head"):
            if isinstance(getattr(backbone, name, None), nn.Linear):  # timm's heads also hold the pooling
                setattr(backbone, name, nn.Identity())
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
        # some networks return (features, ...) in train mode
        features = [f[0] if isinstance(f, tuple) else f for f in features]
        return torch.cat([f.float() for f in features])

    def forward(self, views: Tensor | list[Tensor]) -> Tensor:
        """Head outputs of all views, crop-major, shape (V * B, K)."""
        return self.head(self.embed(views))
