"""Vision Transformer (Dosovitskiy et al. 2021) and the projection head of DINO (Caron et al. 2021).

Needs torch only: the file can be lifted out alone. Parameter names are those of the released checkpoints.
"""

import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Tokens of several resolutions are packed into one matrix (T, D); the layout lists (B, N) of each batch.
Layout = list[tuple[int, int]]


def pack(batches: list[Tensor]) -> tuple[Tensor, Layout]:
    """Joins token batches (B, N, D) of several resolutions to one matrix (T, D) and its layout."""
    return torch.cat([tokens.flatten(0, 1) for tokens in batches]), [tuple(t.shape[:2]) for t in batches]


def unpack(packed: Tensor, layout: Layout) -> list[Tensor]:
    """Inverse of :func:`pack`; the batches are views of the matrix."""
    parts = packed.split([B * N for B, N in layout])
    return [part.view(B, N, -1) for part, (B, N) in zip(parts, layout, strict=True)]


def trunc_normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0
) -> Tensor:
    """Fills the tensor from a normal distribution cut at the absolute values ``a`` and ``b``, in place."""
    low, high = (math.erf((cut - mean) / (std * math.sqrt(2))) for cut in (a, b))
    with torch.no_grad():
        return tensor.uniform_(low, high).erfinv_().mul_(std * math.sqrt(2)).add_(mean).clamp_(a, b)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a sample's branch with probability ``drop_prob``."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep_prob = 1 - self.drop_prob
        num_samples = len(x) if layout is None else sum(B for B, _ in layout)
        keep = (keep_prob + torch.rand(num_samples, dtype=x.dtype, device=x.device)).floor_() / keep_prob
        if layout is not None:
            keep = torch.cat(
                [
                    k.repeat_interleave(N)
                    for k, (B, N) in zip(keep.split([B for B, _ in layout]), layout, strict=True)
                ]
            )
        return x * keep.view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def split_heads(self, qkv: Tensor) -> Tensor:
        """(B, N, 3D) -> queries, keys and values stacked, (3, B, heads, N, D / heads)."""
        return qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def attend(self, qkv: Tensor, num_queries: int | None = None) -> Tensor:
        """(B, N, 3D) -> (B, N, D), for the first ``num_queries`` tokens only if given."""
        q, k, v = self.split_heads(qkv).unbind()
        dropout_p = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(
            q[:, :, :num_queries], k, v, dropout_p=dropout_p, scale=self.scale
        )
        return out.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); or packed (T, D) -> (T, D), where a token attends to those of its image."""
        qkv = self.qkv(x)
        if layout is None:
            out = self.attend(qkv)
        else:
            out, _ = pack([self.attend(batch) for batch in unpack(qkv, layout)])
        return self.proj_drop(self.proj(out))

    def class_token(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """Output for the class tokens only, (B, N, D) or packed (T, D) -> (all images, D)."""
        qkv = self.qkv(x)
        batches = [qkv] if layout is None else unpack(qkv, layout)
        out = torch.cat([self.attend(batch, num_queries=1).squeeze(1) for batch in batches])
        return self.proj_drop(self.proj(out))

    def attention_map(self, x: Tensor) -> Tensor:
        """Softmaxed attention, (B, N, D) -> (B, heads, N, N)."""
        q, k, _ = self.split_heads(self.qkv(x)).unbind()
        return (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)


class Block(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        drop: float,
        attn_drop: float,
        drop_path: float,
        norm_layer,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), layout), layout)
        return x + self.drop_path(self.mlp(self.norm2(x)), layout)

    def class_token(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """The block's output for the class tokens only, (all images, D), for a quarter of the work."""
        batches = [x] if layout is None else unpack(x, layout)
        cls = torch.cat([tokens[:, 0] for tokens in batches])
        cls = cls + self.drop_path(self.attn.class_token(self.norm1(x), layout))
        return cls + self.drop_path(self.mlp(self.norm2(cls)))


class PatchEmbed(nn.Module):
    """Non-overlapping patches, linearly embedded; pixels that do not fill a patch are left out."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    packs_resolutions = True

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
        norm_layer=nn.LayerNorm,
    ):
        super().__init__()
        img_size = img_size if isinstance(img_size, int) else img_size[0]
        self.num_features = self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                qk_scale,
                drop_rate,
                attn_drop_rate,
                rate,
                norm_layer,
            )
            for rate in torch.linspace(0, drop_path_rate, depth).tolist()
        )
        self.norm = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)

    def interpolate_pos_encoding(self, height: int, width: int) -> Tensor:
        stored = self.pos_embed.shape[1] - 1
        side = math.isqrt(stored)
        rows, columns = height // self.patch_embed.patch_size, width // self.patch_embed.patch_size
        if rows * columns == stored and height == width:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def prepare_tokens(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1)
        return self.pos_drop(tokens + self.interpolate_pos_encoding(*x.shape[-2:]))

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        if isinstance(x, Tensor):
            tokens, layout = self.prepare_tokens(x), None
        else:
            tokens, layout = pack([self.prepare_tokens(batch) for batch in x])
        for block in self.blocks[:-1]:
            tokens = block(tokens, layout)
        return self.norm(self.blocks[-1].class_token(tokens, layout))

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        tokens = self.prepare_tokens(x)
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        last = self.blocks[-1]
        return last.attn.attention_map(last.norm1(tokens))

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        tokens, outputs = self.prepare_tokens(x), []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            if i >= len(self.blocks) - n:
                outputs.append(self.norm(tokens))
        return outputs


def init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def vit_tiny(patch_size: int = 16, **kwargs) -> VisionTransformer:
    return _vit(patch_size, embed_dim=192, num_heads=3, **kwargs)


def vit_small(patch_size: int = 16, **kwargs) -> VisionTransformer:
    return _vit(patch_size, embed_dim=384, num_heads=6, **kwargs)


def vit_base(patch_size: int = 16, **kwargs) -> VisionTransformer:
    return _vit(patch_size, embed_dim=768, num_heads=12, **kwargs)


def _vit(patch_size: int, **kwargs) -> VisionTransformer:
    return VisionTransformer(
        patch_size=patch_size, depth=12, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6), **kwargs
    )


class WeightNormLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight_g / self.weight_v.norm(dim=1, keepdim=True)
        return F.linear(x, self.weight_v) * scale.T


class DINOHead(nn.Module):
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
        if nlayers <= 1:
            self.mlp = nn.Linear(in_dim, bottleneck_dim)
        else:
            widths = [in_dim] + [hidden_dim] * (nlayers - 1)
            layers = []
            for width_in, width_out in itertools.pairwise(widths):
                layers += [
                    nn.Linear(width_in, width_out),
                    *([nn.BatchNorm1d(width_out)] if use_bn else []),
                    nn.GELU(),
                ]
            self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        self.apply(init_linear)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad = not norm_last_layer

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))
