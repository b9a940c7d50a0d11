"""Attention of the class token to the patches, of a ViT or XCiT (Caron et al. 2021, figure 1)."""

from pathlib import Path

import torch
from timm.models.xcit import Xcit
from torch import Tensor, nn

from shared.pictures.attention import save_attention_maps

from .augmentations import MEAN, STD
from .vision_transformer import VisionTransformer


def has_class_attention(model: nn.Module) -> bool:
    """Whether it is a ViT of this folder or timm's XCiT."""
    return isinstance(model, VisionTransformer | Xcit)


@torch.no_grad()
def class_attention(model: VisionTransformer | Xcit, images: Tensor) -> Tensor:
    """Attention of the class token to the patches in the last block (of XCiT: in the last class-attention block).

    Args:
        images: Normalised, shape (B, C, H, W); rows and columns beyond a multiple of the patch size are not seen.

    Returns:
        Shape (B, heads, H / patch, W / patch); the share of the class token itself is missing from the sum of 1.

    Raises:
        ValueError: If the image is smaller than a patch.
    """
    patch_size = model.patch_embed.patch_size
    rows, columns = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    if rows == 0 or columns == 0:
        raise ValueError(f"--image_size: {tuple(images.shape[-2:])} pixels are less than a patch of {patch_size}")
    images = images[:, :, : rows * patch_size, : columns * patch_size]
    if isinstance(model, Xcit):
        attention = last_class_attention(model, images)
    else:
        attention = model.get_last_selfattention(images, num_queries=1)[:, :, 0]
    return attention[:, :, 1:].unflatten(2, (rows, columns))


def last_class_attention(model: Xcit, images: Tensor) -> Tensor:
    """Weights of the class token's attention to all tokens in XCiT's last block: (B, heads, 1 + N)."""
    layer, tokens = model.cls_attn_blocks[-1].attn, []
    hook = layer.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    try:
        model.forward_features(images)
    finally:
        hook.remove()
    queries, keys = (x.unflatten(2, (layer.num_heads, -1)) for x in (layer.q(tokens[0][:, :1]), layer.k(tokens[0])))
    scores = torch.einsum("bqhd,bnhd->bhn", queries, keys) * queries.shape[-1] ** -0.5
    return scores.softmax(dim=-1)


def save_attention(
    model: VisionTransformer | Xcit, image: Tensor, output_dir: str | Path, threshold: float | None = None
) -> list[Path]:
    """The attention of one image as pictures, see :func:`shared.pictures.attention.save_attention_maps`.

    Args:
        image: Normalised, shape (C, H, W), on the model's device.
        output_dir: Created if missing.
        threshold: Share of the attention that the masks hold, in (0, 1].

    Returns:
        The paths, the sheet first.
    """
    training = model.training
    attention = class_attention(model.eval(), image[None])[0]
    model.train(training)
    return save_attention_maps(attention, image, model.patch_embed.patch_size, output_dir, MEAN, STD, threshold)
