"""Parts of Vision Transformers that several networks are built of.

Needs torch only, so a network's file can be lifted out with this one beside it. Names and order of the parameters are
those of timm and of the official codes. B images, N tokens per image, D channels per token.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = {(96, 4): 3, (1152, 27): 16, (1280, 32): 16, (1408, 40): 16, (1664, 48): 16}  # by width and blocks


def heads_of(width: int, depth: int, origin: str = "the weights") -> int:
    """Attention heads of a ViT of D = ``width`` and so many blocks, of which only the tensors are known.

    Published networks have one for every 64 channels up to a width of 1024, or what ``HEADS`` says.

    Raises:
        ValueError: With ``origin``, for any other one.
    """
    if (width, depth) not in HEADS and (width % 64 or width > 1024):
        raise ValueError(f"{origin}: how many heads a ViT of width {width} and {depth} blocks has is not known here")
    return HEADS.get((width, depth), width // 64)


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    scale: float | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """softmax(scale QK^T) V: (B, heads, N, d) -> (B, heads, N, d), with dropout of the softmax.

    torch's fused function, except for gradients in bfloat16 on a CPU: there its backward pass makes no use of the
    processor's bfloat16 units, and up to about 1000 tokens the products written out are faster, few tokens 8 times.

    Args:
        scale: 1 / sqrt(d) by default.
        allowed: True where a query may look, somewhere for every query; broadcast to (B, heads, N, M).
    """
    learns_in_bf16 = q.dtype == torch.bfloat16 and torch.is_grad_enabled() and q.requires_grad
    if not (learns_in_bf16 and q.device.type == "cpu" and k.shape[2] <= 1024):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout_p, scale=scale)
    return attention_written_out(q, k, v, dropout_p, scale, allowed)


def attention_written_out(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, scale: float | None, allowed: Tensor | None
) -> Tensor:
    """:func:`scaled_dot_product_attention` as two products, with the softmax in the type of its input."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        scores = q * scale @ k.transpose(-2, -1)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        return F.dropout(scores.softmax(dim=-1), dropout_p) @ v


class Attention(nn.Module):
    """Multi-head self-attention among the tokens of an image.

    Args:
        dim: D, split evenly among the heads.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_scale: Factor of the attention logits; (D / heads)^-0.5 by default.
        attn_drop, proj_drop: Dropout of the attention and of the output.

    Raises:
        ValueError: If the heads do not divide D.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"a width of {dim} cannot be split into {num_heads} heads")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), or (B, num_queries, D) for the first tokens."""
        return self.proj_drop(self.proj(self.attend(self.qkv(x), num_queries)))

    def attend(self, qkv: Tensor, num_queries: int | None = None) -> Tensor:
        """softmax(QK^T / sqrt(D / heads)) V: (B, N, 3D) -> (B, N, D), or (B, num_queries, D) for the first tokens."""
        q, k, v = self._split_heads(qkv)
        dropout_p = self.attn_drop.p if self.training else 0.0
        out = scaled_dot_product_attention(q[:, :, :num_queries], k, v, dropout_p, self.scale)
        return out.transpose(1, 2).flatten(2)

    def attention_map(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """Softmaxed attention, (B, N, D) -> (B, heads, N, N), or of the first ``num_queries`` tokens to all."""
        q, k, _ = self._split_heads(self.qkv(x))
        return (q[:, :, :num_queries] @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, 3D) -> queries, keys, values, each (B, heads, N, D / heads)."""
        return qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a sample's residual branch with probability ``drop_prob``.

    Raises:
        ValueError: If the probability is outside [0, 1).
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"drop_path_rate {drop_prob} is outside [0, 1)")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Samples along the first dimension."""
        if not self.training or self.drop_prob == 0:
            return x
        keep_prob = 1 - self.drop_prob
        return x * x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(keep_prob).div_(keep_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


class PatchEmbed(nn.Module):
    """Square patches, each mapped linearly to a token; pixels that do not fill a patch are left out.

    Attributes:
        grid: Rows and columns of the patches of an image of ``img_size`` pixels.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.grid = (img_size // patch_size, img_size // patch_size)
        self.num_patches = math.prod(self.grid)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, patches row by row, D).

        Raises:
            ValueError: If the image is smaller than a patch.
        """
        height, width = images.shape[-2:]
        if min(height, width) < self.patch_size:
            raise ValueError(f"an image of {height}x{width} pixels holds no patch of {self.patch_size}")
        return self.proj(images).flatten(2).transpose(1, 2)


def interpolate_positions(
    positions: Tensor,
    rows: int,
    columns: int,
    stored: tuple[int, int] | None = None,
    scale_offset: float = 0.0,
) -> Tensor:
    """Positions for a grid of ``rows`` x ``columns`` patches, bicubic without antialiasing.

    Grids are compared, not their numbers of patches: 2 x 8 patches need other positions than 4 x 4.

    Args:
        positions: Tokens that stand before the patches, then a grid of patches row by row, shape (1, P + N, D).
        stored: Rows and columns of that grid; by default it is square and one class token stands before it.
        scale_offset: The grid is stretched as if it had so many more rows and columns; DINO's released weights are
            used with 0.1, and a grid with an offset is interpolated even if it is the stored one.

    Returns:
        Shape (1, P + rows * columns, D); the same tensor if the grid is the stored one.

    Raises:
        ValueError: If ``positions`` do not hold the stored grid.
    """
    num_before = 1 if stored is None else positions.shape[1] - math.prod(stored)
    stored = stored or (math.isqrt(positions.shape[1] - 1),) * 2
    if num_before < 0 or num_before + math.prod(stored) != positions.shape[1]:
        raise ValueError(f"{positions.shape[1]} positions do not hold a grid of {stored[0]}x{stored[1]} patches")
    if (rows, columns) == stored and not scale_offset:
        return positions
    before, grid = positions[:, :num_before], positions[:, num_before:]
    grid = grid.unflatten(1, stored).permute(0, 3, 1, 2)
    if scale_offset and torch.jit.is_tracing():  # sizes that stay free in ONNX, which no scale factor can be
        row, column = (bicubic_matrix(*sizes, scale_offset) for sizes in zip((rows, columns), stored, strict=True))
        resized = torch.einsum("ri,cj,bdij->bdrc", row, column, grid)
        row, column = (torch.arange(n).clamp(max=most - 1) for n, most in zip((rows, columns), stored, strict=True))
        is_stored = torch.as_tensor(rows == stored[0]) & torch.as_tensor(columns == stored[1])
        grid = torch.where(is_stored, grid[:, :, row][..., column], resized)
    elif scale_offset:
        factors = (rows + scale_offset) / stored[0], (columns + scale_offset) / stored[1]
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
    else:  # a scale factor could miss a row when rounded
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic")
    return torch.cat([before, grid.flatten(2).transpose(1, 2)], dim=1)


def bicubic_matrix(size: int | Tensor, stored: int, scale_offset: float) -> Tensor:
    """Weights (size, stored) with which torch interpolates ``stored`` values by ``(size + scale_offset) / stored``."""
    places = (torch.arange(size) + 0.5) * (stored / (size + scale_offset)) - 0.5
    first, matrix, a = places.floor(), 0.0, -0.75
    for tap in (-1, 0, 1, 2):
        d = (places - first - tap).abs()
        near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        column = (first + tap).clamp(0, stored - 1)
        matrix = matrix + torch.where(d <= 1, near, far)[:, None] * (column[:, None] == torch.arange(stored))
    return matrix


def init_linear(module: nn.Module) -> None:
    """Linear layers: weights from a normal distribution of standard deviation 0.02, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
