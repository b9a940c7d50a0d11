"""The Vision Transformer of FlexiViT: one set of weights, called with any size of patches.

Needs torch and :mod:`shared.networks.vit_parts`. Parameters have timm's names. B images, C channels, N tokens, D
channels per token; sizes are (height, width) in pixels, grids (rows, columns) in patches.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.networks.vit_parts import Attention, Mlp, scaled_dot_product_attention

SIZES = {  # width, blocks, heads
    "micro": (128, 4, 4),  # for images of 32 pixels
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "h": (1280, 32, 16),
}

# --- Resizing what depends on the size of the patches -----------------------------------------------------------------


def resize_matrix(old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """B of section 3.3: the bilinear resize of a patch as a matrix, float64, (new pixels, old pixels), row by row.

    Half-pixel centres, no antialiasing.
    """
    pixels = torch.eye(math.prod(old), dtype=torch.double).view(-1, 1, *old)
    return F.interpolate(pixels, size=new, mode="bilinear", align_corners=False).flatten(1).T


@lru_cache(maxsize=256)
def pi_resize_matrix(old: tuple[int, int], new: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The pseudo-inverse of B^T, (new pixels, old pixels): w' = (B^T)^+ w has <Bx, w'> = <x, w> where that can be."""
    return torch.linalg.pinv(resize_matrix(old, new).T).to(device, dtype)


def pi_resize(kernel: Tensor, new: tuple[int, int]) -> Tensor:
    """Patch embedding for patches of another size, of which gradients go to the given one (section 3.3).

    Exact for larger patches: the tokens of resized patches are those of the patches. Resizes must not be chained.

    Args:
        kernel: (D, C, height, width).
        new: Height and width.

    Returns:
        (D, C, *new); the same tensor if it has that size.
    """
    old = tuple(kernel.shape[-2:])
    if old == tuple(new):
        return kernel
    with torch.autocast(kernel.device.type, enabled=False):
        matrix = pi_resize_matrix(old, tuple(new), kernel.device, kernel.dtype)
        return (kernel.flatten(2) @ matrix.T).unflatten(2, tuple(new))


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings (1, N, D) of one grid for another: bilinear, antialiased where it shrinks.

    Grids are compared, not their numbers of patches, so that 4 x 9 positions are no 6 x 6 ones.
    """
    if old == new:
        return positions
    grid = positions.unflatten(1, old).permute(0, 3, 1, 2)
    with torch.autocast(positions.device.type, enabled=False):
        grid = F.interpolate(grid, size=new, mode="bilinear", align_corners=False, antialias=True)
    return grid.flatten(2).transpose(1, 2)


def zoom_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The same for a network that starts from another one's weights: bilinear between the centres of corner patches."""
    grid = positions.unflatten(1, old).permute(0, 3, 1, 2)
    return F.interpolate(grid, size=new, mode="bilinear", align_corners=True).flatten(2).transpose(1, 2)


def sincos_positions(grid: tuple[int, int], dim: int, temperature: float = 10000.0) -> Tensor:
    """Fixed position embeddings (1, N, D): sin x, cos x, sin y, cos y of D / 4 frequencies each.

    Raises:
        ValueError: If D is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a width of {dim} is no multiple of 4, as sine and cosine of two axes need")
    frequencies = temperature ** -(torch.arange(dim // 4, dtype=torch.double) / max(dim // 4 - 1, 1))
    y, x = (axis.flatten()[:, None] * frequencies for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()[None]


# --- Network ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and MLP, each on normalised tokens and added to them."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, gelu: str):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden_dim)
        self.mlp.act = nn.GELU(approximate=gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AttentionPool(nn.Module):
    """One learned query attends to all tokens ("MAP"); an MLP is added to what it finds."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, gelu: str):
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden_dim)
        self.mlp.act = nn.GELU(approximate=gelu)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)."""
        q = self.q(self.latent.expand(x.shape[0], -1, -1)).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (x + self.mlp(self.norm(x)))[:, 0]


class PatchKernel(nn.Module):
    """Holds the underlying patch embedding, ``proj``, under timm's name."""

    def __init__(self, in_chans: int, dim: int, patch_size: int | tuple[int, int]):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)


class FlexiViT(nn.Module):
    """A ViT whose patch embedding and positions are resized at every call.

    Args:
        width, depth, num_heads: D, number of blocks, attention heads.
        patch_size: Of the underlying patch embedding, a side or (height, width) in pixels.
        grid: Rows and columns of the underlying position embeddings.
        num_classes: Outputs of the classifier; 0: none, the network gives representations.
        hidden_dim: Of the MLPs; by default 4 D.
        positions: ``learn``, or ``sincos2d``: fixed.
        pool: What represents an image: ``tok`` (a class token, which has no position), ``gap`` (the mean of the
            tokens) or ``map`` (:class:`AttentionPool`).
        gelu: ``tanh``, the approximation of the published networks, or ``none``, the exact function of most others.
        in_chans: C.
    """

    def __init__(
        self,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        patch_size: int | tuple[int, int] = 32,
        grid: tuple[int, int] = (7, 7),
        num_classes: int = 0,
        hidden_dim: int | None = None,
        positions: str = "learn",
        pool: str = "tok",
        gelu: str = "tanh",
        in_chans: int = 3,
    ):
        super().__init__()
        if positions not in ("learn", "sincos2d") or pool not in ("tok", "gap", "map"):
            raise ValueError(f"positions {positions!r} or pool {pool!r} is unknown")
        hidden_dim = hidden_dim or 4 * width
        self.grid, self.pool, self.width = tuple(grid), pool, width
        self.patch_embed = PatchKernel(in_chans, width, patch_size)
        if positions == "learn":
            self.pos_embed = nn.Parameter(torch.empty(1, math.prod(grid), width))
        else:
            self.register_buffer("pos_embed", sincos_positions(self.grid, width), persistent=False)
        if pool == "tok":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads, hidden_dim, gelu) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if pool == "map":
            self.attn_pool = AttentionPool(width, num_heads, hidden_dim, gelu)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation: Xavier, MLP biases of 1e-6, a classifier of zeros."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.normal_(module.bias, std=1e-6) if ".mlp." in name else nn.init.zeros_(module.bias)
            if isinstance(module, Attention):  # queries, keys and values are matrices of their own
                for matrix in module.qkv.weight.chunk(3):
                    nn.init.xavier_uniform_(matrix)
        nn.init.normal_(self.patch_embed.proj.weight, std=self.width**-0.5)
        nn.init.zeros_(self.patch_embed.proj.bias)
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.normal_(self.pos_embed, std=self.width**-0.5)
        if self.pool == "map":
            nn.init.xavier_uniform_(self.attn_pool.latent[0])
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of the underlying patch embedding."""
        return tuple(self.patch_embed.proj.kernel_size)

    def patches_for(
        self, image: tuple[int, int], patch_size: int | tuple[int, int] | None = None, grid: int | None = None
    ) -> tuple[int, int]:
        """Height and width of the patches of a call.

        Args:
            image: Height and width in pixels.
            patch_size: The size itself; by default that of the underlying patch embedding.
            grid: Patches a side instead ("seqhw"): what does not divide is left over, so that there may be more.

        Raises:
            ValueError: If both are given, or no patch fits into the image.
        """
        if grid is not None and patch_size is not None:
            raise ValueError(f"patch_size {patch_size} and grid {grid}: only one of the two")
        if grid is not None:
            size = (image[0] // grid, image[1] // grid)
        else:
            size = self.patch_size if patch_size is None else patch_size
            size = (size, size) if isinstance(size, int) else tuple(size)
        if min(size) < 1 or size[0] > image[0] or size[1] > image[1]:
            wanted = f"patches of {size[0]}x{size[1]} pixels" if grid is None else f"{grid} patches a side"
            raise ValueError(f"an image of {image[0]}x{image[1]} pixels cannot have {wanted}")
        return size

    def embed(self, images: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Tokens of the patches, (B, C, H, W) -> (B, N, D), and their grid; pixels that fill no patch are left out."""
        projection = self.patch_embed.proj
        tokens = F.conv2d(images, pi_resize(projection.weight, size), projection.bias, stride=size)
        return tokens.flatten(2).transpose(1, 2), tuple(tokens.shape[-2:])

    def encode(
        self, images: Tensor, patch_size: int | tuple[int, int] | None = None, grid: int | None = None
    ) -> Tensor:
        """Normalised tokens of the last block, (B, N, D), a class token first; arguments of :meth:`patches_for`."""
        x, new = self.embed(images, self.patches_for(images.shape[-2:], patch_size, grid))
        x = x + resize_positions(self.pos_embed, self.grid, new)
        if self.pool == "tok":
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        return self.norm(self.blocks(x))

    def represent(
        self, images: Tensor, patch_size: int | tuple[int, int] | None = None, grid: int | None = None
    ) -> Tensor:
        """(B, C, H, W) -> (B, D)."""
        x = self.encode(images, patch_size, grid)
        if self.pool == "map":
            return self.attn_pool(x)
        return x[:, 0] if self.pool == "tok" else x.mean(dim=1)

    def forward(
        self, images: Tensor, patch_size: int | tuple[int, int] | None = None, grid: int | None = None
    ) -> Tensor:
        """(B, C, H, W) -> logits (B, classes), or representations (B, D) without a classifier."""
        return self.head(self.represent(images, patch_size, grid))


class AtPatchSize(nn.Module):
    """A FlexiViT that is always called with the same patches, as what knows nothing of them calls it."""

    def __init__(self, network: FlexiViT, patch_size: int | None = None, grid: int | None = None):
        super().__init__()
        self.network, self.options = network, {"patch_size": patch_size, "grid": grid}

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images, **self.options)
