"""Vision Transformer that computes only the patches it keeps, and the projection head of MSN (Assran et al. 2022).

Needs torch only, so the file can be lifted out alone. Modules and parameters have the names of the official code, so
that released checkpoints load.

    encoder = build("deit_small")
    encoder(torch.randn(8, 3, 224, 224))                        # class tokens, (8, 384)
    encoder(torch.randn(8, 3, 224, 224), patch_drop=0.15)       # from 166 of the 196 patches
    encoder.fc = ProjectionHead(384)                            # now embeddings, (8, 256)

Dropped patches are taken out before the first block: time and memory of the blocks fall with their share.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def num_kept_patches(num_patches: int, patch_drop: float) -> int:
    """Patches that a mask leaves: ``num_patches * (1 - patch_drop)``, rounded down in double precision.

    Raises:
        ValueError: If ``patch_drop`` is outside [0, 1) or leaves no patch.
    """
    kept = int(num_patches * (1 - patch_drop))
    if not 0 <= patch_drop < 1 or kept < 1:
        raise ValueError(f"a patch_drop of {patch_drop} leaves none of the {num_patches} patches of an image")
    return kept


def draw_kept_patches(num_patches: int, patch_drop: float) -> Tensor:
    """Random indices of the patches that are kept, from torch's global generator on the CPU, shape (kept,)."""
    return torch.randperm(num_patches)[: num_kept_patches(num_patches, patch_drop)]


def interpolate_positions(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Positions of another grid of patches, bicubic without antialiasing.

    Args:
        positions: Class token and a square grid row by row, shape (1, 1 + N, D).

    Returns:
        Shape (1, 1 + rows * columns, D); the same tensor if the grid is that of ``positions``.
    """
    side = math.isqrt(positions.shape[1] - 1)
    if (rows, columns) == (side, side):
        return positions
    cls, grid = positions[:, :1], positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    # the official code gives a scale factor, whose exact value this is; rounded, it can miss a row
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic")
    return torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a sample's residual branch with probability ``drop_prob``."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep_prob = 1 - self.drop_prob
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device) < keep_prob
        return x * keep / keep_prob


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(self.act(self.fc1(x)))


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(QK^T / sqrt(d)) V: (B, heads, N, d) -> (B, heads, N, d).

    torch's fused function, except for gradients in bfloat16 on a CPU: there its backward pass makes no use of the
    processor's bfloat16 units, and up to about 1000 tokens the products written out are faster, few tokens 8 times.
    """
    learns_in_bf16 = q.dtype == torch.bfloat16 and torch.is_grad_enabled() and q.requires_grad
    if not (learns_in_bf16 and q.device.type == "cpu" and k.shape[2] <= 1024):
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):  # the softmax in the type of its input
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention among the tokens of an image."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"a width of {dim} cannot be split into {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """softmax(QK^T / sqrt(D / heads)) V: (B, N, D) -> (B, N, D), or (B, num_queries, D) for the first tokens."""
        q, k, v = self._split_heads(x)
        out = scaled_dot_product_attention(q[:, :, :num_queries], k, v)
        return self.proj(out.transpose(1, 2).flatten(2))

    def attention_map(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """Softmaxed attention, (B, N, D) -> (B, heads, N, N), or of the first ``num_queries`` tokens to all."""
        q, k, _ = self._split_heads(x)
        return (q[:, :, :num_queries] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)

    def _split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> queries, keys, values, each (B, heads, N, D / heads)."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


class Block(nn.Module):
    """Pre-norm Transformer block: attention, then an MLP, each on a residual branch."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, norm_layer: Callable[[int], nn.Module]
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads)
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), or (B, num_queries, D) for the first tokens only."""
        x = x[:, :num_queries] + self.drop_path(self.attn(self.norm1(x), num_queries))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Square patches, each mapped linearly to a token; pixels that do not fill a patch are left out."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, rows, columns)."""
        return self.proj(x)


class ConvEmbed(nn.Module):
    """Tokens of 16 x 16 pixels from four strided 3 x 3 convolutions (Xiao et al. 2021) instead of one large one."""

    CHANNELS = (48, 96, 192, 384)

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        if patch_size != 16:
            raise ValueError(f"patch_size {patch_size}: a convolutional stem makes patches of 16 pixels")
        self.patch_size = patch_size
        self.num_patches = (img_size // patch_size) ** 2
        layers: list[nn.Module] = []
        for before, after in zip((in_chans, *self.CHANNELS), self.CHANNELS, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.stem = nn.Sequential(*layers, nn.Conv2d(self.CHANNELS[-1], embed_dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H / 16, W / 16); sides are cut to multiples of 16."""
        rows, columns = (side // self.patch_size * self.patch_size for side in x.shape[-2:])
        return self.stem(x[..., :rows, :columns])


class ProjectionHead(nn.Module):
    """Three linear layers with batch norms and GELUs between them, class token -> embedding.

    Args:
        in_dim: Width of the class token.
        hidden_dim: Width of the two hidden layers.
        out_dim: D, width of the embedding.
        use_bn: Batch normalisation after the first two layers.
    """

    def __init__(self, in_dim: int, hidden_dim: int = 2048, out_dim: int = 256, use_bn: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden_dim)
        if use_bn:
            self.bn1 = nn.BatchNorm1d(hidden_dim)
        self.gelu1 = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        if use_bn:
            self.bn2 = nn.BatchNorm1d(hidden_dim)
        self.gelu2 = nn.GELU()
        self.fc3 = nn.Linear(hidden_dim, out_dim)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, in_dim) -> (rows, out_dim)."""
        for module in self.children():
            x = module(x)
        return x


class VisionTransformer(nn.Module):
    """Vision Transformer that can leave out patches, with a head ``fc`` on its class token.

    Args:
        img_size: Side in pixels of the images for which positions are stored; others are interpolated.
        patch_size: Side of a patch in pixels.
        in_chans: C, channels of the images.
        embed_dim: Width of a token.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        mlp_ratio: Width of the MLPs' hidden layer over that of a token.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        conv_stem: Convolutions instead of the linear map of patches.

    Attributes:
        fc: Head, ``nn.Identity`` until one is set.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        conv_stem: bool = False,
    ):
        super().__init__()
        if not 1 <= patch_size <= img_size:
            raise ValueError(f"patch_size {patch_size} must be between 1 and the image side of {img_size} pixels")
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.embed_dim = embed_dim
        self.patch_embed = (ConvEmbed if conv_stem else PatchEmbed)(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, rate, norm_layer) for rate in rates)
        self.norm = norm_layer(embed_dim)
        self.fc: nn.Module = nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_weights)

    def forward(self, x: Tensor | list[Tensor], patch_drop: float = 0.0) -> Tensor:
        """Outputs of the head for images, or the class tokens while there is none.

        Args:
            x: Images (B, C, H, W), or a list of batches. Consecutive batches of one size run as one: they share the
                mask, and the statistics of the head's batch norms.
            patch_drop: Share of the patches that is left out of the first size only, in [0, 1).

        Returns:
            (B, D), or the outputs of all batches in their order, (sum of B, D).

        Raises:
            ValueError: If no patch is left.
        """
        views = [x] if isinstance(x, Tensor) else x
        outputs = []
        for _, group in groupby(views, key=lambda view: view.shape[-2:]):
            outputs.append(self.fc(self.class_token(torch.cat(list(group)), patch_drop if not outputs else 0.0)))
        return torch.cat(outputs)

    def class_token(self, x: Tensor, patch_drop: float = 0.0) -> Tensor:
        """Class token after the last block and the final norm, (B, C, H, W) -> (B, D)."""
        tokens = self.prepare_tokens(x, patch_drop)
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens)
        return self.norm(last(tokens, num_queries=1))[:, 0]  # no other token of the last block is looked at

    def forward_blocks(self, x: Tensor, num_blocks: int = 1, patch_drop: float = 0.0) -> Tensor:
        """Class tokens after each of the last blocks, before the final norm: (B, C, H, W) -> (B, num_blocks * D)."""
        outputs = self._last_blocks(self.prepare_tokens(x, patch_drop), num_blocks)
        return torch.cat([tokens[:, 0] for tokens in outputs], dim=1)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Outputs of the last ``n`` blocks, earliest first, each (B, 1 + patches, D) and after the final norm."""
        return [self.norm(tokens) for tokens in self._last_blocks(self.prepare_tokens(x), n)]

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

    def prepare_tokens(self, x: Tensor, patch_drop: float = 0.0) -> Tensor:
        """Class token and patches with their positions, without the dropped ones.

        Args:
            x: Images (B, C, H, W); one mask for all of them.

        Returns:
            Shape (B, 1 + kept, D), patches in the random order of the mask.
        """
        if min(x.shape[-2:]) < self.patch_embed.patch_size:
            size = f"{x.shape[-2]}x{x.shape[-1]}"
            raise ValueError(f"an image of {size} pixels holds no patch of {self.patch_embed.patch_size}")
        grid = self.patch_embed(x)
        positions = interpolate_positions(self.pos_embed, *grid.shape[-2:])
        patches = grid.flatten(2).transpose(1, 2) + positions[:, 1:]
        if patch_drop:
            patches = patches.index_select(1, draw_kept_patches(patches.shape[1], patch_drop).to(x.device))
        cls_token = self.cls_token + positions[:, :1]
        return torch.cat([cls_token.expand(x.shape[0], -1, -1), patches], dim=1)

    def _last_blocks(self, tokens: Tensor, n: int) -> list[Tensor]:
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"the last {n} blocks of a ViT with {len(self.blocks)} blocks")
        outputs = []
        for block in self.blocks:
            tokens = block(tokens)
            outputs.append(tokens)
        return outputs[-n:]


class Trunk(nn.Module):
    """An encoder without its head: images to class tokens."""

    def __init__(self, encoder: VisionTransformer):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D)."""
        return self.encoder.class_token(images)


def init_weights(module: nn.Module) -> None:
    """Linear: normal with standard deviation 0.02, cut at 2; convolutions: He's normal; biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


_TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
_HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
_CONV = {"embed_dim": 384, "depth": 11, "num_heads": 6, "conv_stem": True}

# The names of the official code; deit_small_p8 has patches of 8 pixels, a name without a number patches of 16.
ARCHITECTURES: dict[str, dict] = {
    "deit_tiny": _TINY | {"patch_size": 16},
    "deit_small": _SMALL | {"patch_size": 16},
    "deit_small_p8": _SMALL | {"patch_size": 8},
    "deit_small_p7": _SMALL | {"patch_size": 7},
    "deit_base": _BASE | {"patch_size": 16},
    "deit_base_p8": _BASE | {"patch_size": 8},
    "deit_base_p7": _BASE | {"patch_size": 7},
    "deit_base_p4": _BASE | {"patch_size": 4},
    "deit_large": _LARGE | {"patch_size": 16},
    "deit_large_p8": _LARGE | {"patch_size": 8},
    "deit_large_p7": _LARGE | {"patch_size": 7},
    "deit_huge": _HUGE | {"patch_size": 16},
    "deit_huge_p8": _HUGE | {"patch_size": 8},
    "deit_huge_p7": _HUGE | {"patch_size": 7},
    "deit_huge_p10": _HUGE | {"patch_size": 10},
    "vitc_4gf": _CONV | {"patch_size": 16, "mlp_ratio": 3.0},
    "deit_small_convstem": _CONV | {"patch_size": 16, "mlp_ratio": 6.0},
    # not in the official code: 0.5 million parameters, for images of a few pixels and for trying things out on a CPU
    "deit_micro": {"embed_dim": 96, "depth": 4, "num_heads": 3, "patch_size": 4},
}


def build(name: str, **kwargs) -> VisionTransformer:
    """The encoder of a name of ``ARCHITECTURES``, without a head; ``kwargs`` as of :class:`VisionTransformer`.

    Raises:
        ValueError: If there is none of this name.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown model {name!r}: choose {', '.join(ARCHITECTURES)}")
    return VisionTransformer(**(ARCHITECTURES[name] | kwargs))
