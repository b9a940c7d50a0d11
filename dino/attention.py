"""Attention of the class token to the patches, of a ViT or XCiT (Caron et al. 2021, figure 1)."""

import torch
from torch import Tensor, nn

from shared.pictures.attention import vit_class_row

from .vision_transformer import VisionTransformer


def has_class_attention(model: nn.Module) -> bool:
    """Whether it is a ViT of this folder or timm's XCiT."""
    return isinstance(model, VisionTransformer) or hasattr(model, "cls_attn_blocks")


def class_row(model: nn.Module, images: Tensor) -> Tensor:
    """Attention of the class token to all tokens in the last block, of XCiT in the last class-attention block.

    Shape (B, heads, 1 + N).
    """
    if isinstance(model, VisionTransformer):
        return vit_class_row(model, images)
    layer, tokens = model.cls_attn_blocks[-1].attn, []
    hook = layer.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    try:
        model.forward_features(images)
    finally:
        hook.remove()
    queries, keys = (x.unflatten(2, (layer.num_heads, -1)) for x in (layer.q(tokens[0][:, :1]), layer.k(tokens[0])))
    scores = torch.einsum("bqhd,bnhd->bhn", queries, keys) * queries.shape[-1] ** -0.5
    return scores.softmax(dim=-1)
