"""Vision Transformer (Dosovitskiy et al. 2021) and the projection head of DINO (Caron et al. 2021).

Needs torch and ``shared/networks/vit_parts.py`` only, so the two files can be lifted out alone. Modules, parameters and
the order of random draws within a backbone and within a head are those of the official code: released checkpoints load,
and a seed set before either is built gives it the same initial weights. (``main_dino.py`` builds the two in an order of
its own.)

    backbone = vit_small(patch_size=16)
    backbone(torch.randn(8, 3, 224, 224))                          # class tokens, (8, 384)
    backbone([torch.randn(8, 3, 224, 224), torch.randn(32, 3, 96, 96)])    # in one pass, (40, 384)

Images of several resolutions share a pass: the tokens of all of them are packed into one matrix (T, D) for norms,
projections and MLPs, and only attention looks at one resolution at a time.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.networks import vit_parts

Layout = list[tuple[int, int]]  # (images B, tokens N per image) of each resolution in a packed matrix


def pack(batches: list[Tensor], layout: Layout | None) -> Tensor:
    """Joins tokens (B, N, D) of several resolutions to (T, D); without a layout the only batch stays as it is."""
    return batches[0] if layout is None else torch.cat([tokens.flatten(0, 1) for tokens in batches])


def unpack(tokens: Tensor, layout: Layout | None) -> list[Tensor]:
    """Inverse of :func:`pack`; the batches are views of the matrix."""
    if layout is None:
        return [tokens]
    parts = tokens.split_with_sizes([B * N for B, N in layout])
    return [part.view(B, N, -1) for part, (B, N) in zip(parts, layout, strict=True)]


def recompute(function: Callable[[Tensor], Tensor], x: Tensor, draws: bool = False) -> Tensor:
    """``function(x)`` that keeps only ``x`` for the backward pass, where the rest is computed again.

    The second run stops at the last tensor that was to be kept. A ``function`` that ends in a linear layer therefore
    repeats everything up to that layer's input, but not its matrix product.

    Args:
        draws: Whether the function draws random numbers, which then have to be the same again.
    """
    if not torch.is_grad_enabled():
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=draws)


def trunc_normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0) -> Tensor:
    """Fill ``tensor`` from a normal distribution cut at the absolute values ``a`` and ``b``, in place.

    Spelled out because the random numbers behind ``torch.nn.init.trunc_normal_`` depend on torch's version.
    """
    low, high = (math.erf((cut - mean) / (std * math.sqrt(2))) for cut in (a, b))
    with torch.no_grad():
        return tensor.uniform_(low, high).erfinv_().mul_(std * math.sqrt(2)).add_(mean).clamp_(a, b)


def init_linear(module: nn.Module) -> None:
    """Linear layers: weights from a normal distribution with standard deviation 0.02, biases 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class DropPath(vit_parts.DropPath):
    """Stochastic depth, also of packed tokens, drawn as in the official code."""

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """Samples along the first dimension, or tokens (T, D) packed as ``layout`` says."""
        if not self.training or self.drop_prob == 0:
            return x
        keep_prob = 1 - self.drop_prob
        num_samples = len(x) if layout is None else sum(B for B, _ in layout)
        keep = (keep_prob + torch.rand(num_samples, dtype=x.dtype, device=x.device)).floor_() / keep_prob
        if layout is not None:
            samples = keep.split_with_sizes([B for B, _ in layout])
            keep = torch.cat([k.repeat_interleave(N) for k, (_, N) in zip(samples, layout, strict=True)])
        return x * keep.view(-1, *[1] * (x.ndim - 1))


class Mlp(vit_parts.Mlp):
    """Two linear layers with a GELU between them, which keep as little as possible for the backward pass."""

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(..., D) -> (..., D), of ``norm(x)`` if a norm is given."""
        hidden = self.fc1(x) if norm is None else recompute(lambda x: self.fc1(norm(x)), x)
        draws = self.training and self.drop.p > 0
        return self.drop(recompute(lambda hidden: self.fc2(self.drop(self.act(hidden))), hidden, draws))


class Attention(vit_parts.Attention):
    """Multi-head self-attention among the tokens of an image, of several resolutions in one matrix."""

    def forward(self, x: Tensor, layout: Layout | None = None, norm: nn.Module | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), or packed (T, D) -> (T, D); of ``norm(x)`` if a norm is given."""
        qkv = self._project_qkv(x, norm)
        return self.proj_drop(pack([self.proj(self.attend(batch)) for batch in unpack(qkv, layout)], layout))

    def class_tokens(self, x: Tensor, layout: Layout | None = None, norm: nn.Module | None = None) -> Tensor:
        """Output for the class tokens only, (B, N, D) or packed (T, D) -> (images, D)."""
        qkv = self._project_qkv(x, norm)
        out = torch.cat([self.attend(batch, num_queries=1).squeeze(1) for batch in unpack(qkv, layout)])
        return self.proj_drop(self.proj(out))

    def _project_qkv(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        return self.qkv(x) if norm is None else recompute(lambda x: self.qkv(norm(x)), x)


class Block(nn.Module):
    """Pre-norm Transformer block: attention, then an MLP, each on a residual branch.

    The two norms are handed to the branches, which apply them, so that their outputs need not be kept for the
    backward pass.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), or packed (T, D) -> (T, D)."""
        x = x + self.drop_path(self.attn(x, layout, self.norm1), layout)
        return x + self.drop_path(self.mlp(x, self.norm2), layout)

    def class_tokens(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """Output for the class tokens only, (images, D): a quarter of the work of :meth:`forward`."""
        cls = torch.cat([tokens[:, 0] for tokens in unpack(x, layout)])
        cls = cls + self.drop_path(self.attn.class_tokens(x, layout, self.norm1))
        return cls + self.drop_path(self.mlp(cls, self.norm2))


class VisionTransformer(nn.Module):
    """Vision Transformer without a classifier: images to the class token's features.

    Args:
        img_size: Side in pixels of the images for which positions are stored; others are interpolated. Of a list, as
            in the official code, the first entry.
        patch_size: Side of a patch in pixels.
        in_chans: C, channels of the images.
        num_classes: Outputs of ``head``, which :meth:`forward` does not apply; 0 for none.
        embed_dim: D, width of a token.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        mlp_ratio: Width of the MLPs' hidden layer over D.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_scale: Factor of the attention logits; (D / heads)^-0.5 by default.
        drop_rate, attn_drop_rate: Dropout of tokens and of attention.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        norm_layer: Makes a norm for a width.
    """

    packs_resolutions = True  # forward takes a list of batches

    def __init__(
        self,
        img_size: int | list[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 0,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        self.num_features = self.embed_dim = embed_dim
        img_size = img_size if isinstance(img_size, int) else img_size[0]
        self.patch_embed = vit_parts.PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate, rate, norm_layer)
            for rate in rates
        )
        self.norm = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()

        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        """Features of images: the class token after the last block and the final norm.

        Args:
            x: Images (B, C, H, W), or a list of such batches of different resolutions.

        Returns:
            (B, D), or the features of all batches in their order, (sum of B, D).
        """
        if isinstance(x, Tensor):
            tokens, layout = self.prepare_tokens(x), None
        else:
            batches = [self.prepare_tokens(batch) for batch in x]
            layout = [(B, N) for B, N, _ in (tokens.shape for tokens in batches)]
            tokens = pack(batches, layout)
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens, layout)
        if self.training:
            return self.norm(last.class_tokens(tokens, layout))
        # other tokens are not needed either, but hooks that people put on the last block expect them
        tokens = last(tokens, layout)
        return self.norm(torch.cat([batch[:, 0] for batch in unpack(tokens, layout)]))

    def get_last_selfattention(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """Attention of the last block, (B, heads, 1 + patches, 1 + patches), rows of which sum to 1.

        Args:
            x: Images (B, C, H, W).
            num_queries: Only so many first rows; 1 for the class token's.
        """
        tokens = self.prepare_tokens(x)
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens)
        return last.attn.attention_map(last.norm1(tokens), num_queries)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Outputs of the last ``n`` blocks, earliest first, each (B, 1 + patches, D) and after the final norm."""
        tokens, outputs = self.prepare_tokens(x), []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            if i >= len(self.blocks) - n:
                outputs.append(self.norm(tokens))
        return outputs

    def prepare_tokens(self, x: Tensor) -> Tensor:
        """Class token and patches with their positions, (B, C, H, W) -> (B, 1 + patches, D)."""
        patches = self.patch_embed(x)
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)  # not len(x): the batch size stays free in ONNX
        tokens = torch.cat([cls_token, patches], dim=1)
        return self.pos_drop(tokens + self.interpolate_pos_encoding(*x.shape[-2:]))

    def interpolate_pos_encoding(self, height: int, width: int) -> Tensor:
        """Positions for images of ``height`` x ``width`` pixels, (1, 1 + patches, D).

        The stored grid as it is for square images that have it, else its bicubic interpolation. As in the official
        code the scale factor is 0.1 patches too large, which also moves the points that are sampled: the released
        weights are used this way.
        """
        patch_size, stored = self.patch_embed.patch_size, self.patch_embed.grid
        rows, columns = height // patch_size, width // patch_size
        if (rows, columns) == stored and height == width:
            return self.pos_embed
        return vit_parts.interpolate_positions(self.pos_embed, rows, columns, stored, scale_offset=0.1)


def _vit(**kwargs) -> VisionTransformer:
    defaults = {"depth": 12, "qkv_bias": True, "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    return VisionTransformer(**(defaults | kwargs))


def vit_micro(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """4 blocks, width 128, 4 heads, 0.8 million parameters: trains in minutes on a CPU; not in the paper."""
    return _vit(patch_size=patch_size, **({"embed_dim": 128, "depth": 4, "num_heads": 4} | kwargs))


def vit_tiny(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """ViT-Ti: 12 blocks, width 192, 3 heads, 5.5 million parameters."""
    return _vit(patch_size=patch_size, embed_dim=192, num_heads=3, **kwargs)


def vit_small(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """ViT-S: 12 blocks, width 384, 6 heads, 21.7 million parameters."""
    return _vit(patch_size=patch_size, embed_dim=384, num_heads=6, **kwargs)


def vit_base(patch_size: int = 16, **kwargs) -> VisionTransformer:
    """ViT-B: 12 blocks, width 768, 12 heads, 85.8 million parameters."""
    return _vit(patch_size=patch_size, embed_dim=768, num_heads=12, **kwargs)


class DINOHead(nn.Module):
    """Projection head (section 3.1): an MLP, L2 normalisation, and a weight-normalised linear layer.

    Args:
        in_dim: D, width of the features.
        out_dim: K, outputs.
        use_bn: Batch normalisation after every hidden linear layer.
        norm_last_layer: Keep the norms of the last layer's rows at 1.
        nlayers: Linear layers of the MLP.
        hidden_dim: Width of its hidden layers.
        bottleneck_dim: Width of its output.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ):
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (max(nlayers, 1) - 1)]
        layers: list[nn.Module] = []
        for width, next_width in itertools.pairwise(widths):
            layers.append(nn.Linear(width, next_width))
            if use_bn:
                layers.append(nn.BatchNorm1d(next_width))
            layers.append(nn.GELU())
        layers.append(nn.Linear(widths[-1], bottleneck_dim))
        self.mlp = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
        self.apply(init_linear)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Features (rows, D) -> logits (rows, K)."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose weight is g v / |v|, row by row (Salimans & Kingma 2016).

    ``weight_g`` (K, 1) starts at 1, ``weight_v`` (K, D) like the weight of ``nn.Linear``.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, D) -> (rows, K)."""
        return WeightNormProduct.apply(x, self.weight_g, self.weight_v)


class WeightNormProduct(torch.autograd.Function):
    """x (g v / |v|)^T as (x v^T) g / |v|: with K = 65,536 outputs no second array of the weight's size is made."""

    @staticmethod
    def forward(ctx, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
        norm = v.norm(dim=1, keepdim=True)  # (K, 1)
        product = F.linear(x, v)  # (rows, K), in low precision under autocast
        ctx.save_for_backward(x, g, v, norm, product)
        return product * (g / norm).T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, g, v, norm, product = ctx.saved_tensors
        grad_scale = (grad * product).sum(dim=0).unsqueeze(1)
        grad_product = (grad * (g / norm).T).to(product.dtype)
        grad_x = (grad_product @ v.to(product.dtype)).to(x.dtype)
        grad_v = (grad_product.T @ x.to(product.dtype)).to(v.dtype)
        grad_v.addcmul_(v, -grad_scale * g / norm**3)  # through |v|; in place: an array of this size is most of a peak
        return grad_x, grad_scale / norm, grad_v
