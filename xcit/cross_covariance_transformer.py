"""XCiT (El-Nouby et al. 2021): attention between channels, not tokens, so that cost grows linearly with the image.

Needs torch and ``shared/networks/vit_parts.py`` only. Names, shapes and order of the parameters are those of the
published checkpoints::

    network = xcit_small_12_p16(num_classes=1000)
    network.load_state_dict(torch.load("xcit_small_12_p16_224.pth", weights_only=True)["model"])
    logits = network(images)  # (B, 3, H, W), any H and W
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.networks.vit_parts import DropPath, Mlp, init_linear

NUM_FREQUENCIES = 32  # per axis


class ConvPatchEmbed(nn.Module):
    """Tokens from a stack of 3x3 convolutions of stride 2 (section 3.4): (B, C, H, W) -> (B, N, D) and the grid.

    Every stage halves the sides, rounding up, so any image size gives a grid.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        if patch_size not in (8, 16):
            raise ValueError(f"patch_size {patch_size} is neither 8 nor 16")
        stages = int(math.log2(patch_size))
        widths = [in_chans, *(embed_dim // 2**i for i in reversed(range(stages)))]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            convolution = nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(convolution, nn.BatchNorm2d(after)), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        features = self.proj(images)
        return features.flatten(2).transpose(1, 2), features.shape[-2:]


def fourier_features(rows: int, columns: int, device: torch.device | str | None = None) -> Tensor:
    """Sines and cosines of the positions of a grid: (rows, columns, 64), those of y first; float32.

    Positions run from 1 / n to 1 of a full turn whatever the grid, so no table has to be interpolated.
    """
    periods = 10000 ** (2 * (torch.arange(NUM_FREQUENCIES, device=device) // 2) / NUM_FREQUENCIES)

    def one_axis(n: int) -> Tensor:
        angles = torch.arange(1, n + 1, device=device) / (n + 1e-6) * (2 * math.pi)
        angles = angles[:, None] / periods
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1)

    y, x = one_axis(rows), one_axis(columns)
    return torch.cat([y[:, None].expand(-1, columns, -1), x[None].expand(rows, -1, -1)], dim=2)


class FourierPositions(nn.Module):
    """Fourier features of the token grid, projected to D channels: (1, N, D)."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.token_projection = nn.Conv2d(2 * NUM_FREQUENCIES, embed_dim, kernel_size=1)

    def forward(self, rows: int, columns: int) -> Tensor:
        weight = self.token_projection.weight
        features = fourier_features(rows, columns, weight.device).to(weight.dtype)
        return F.linear(features.flatten(0, 1), weight.flatten(1), self.token_projection.bias)[None]


class XCA(nn.Module):
    """Cross-covariance attention (section 3.2): softmax(K^T Q / tau) between the D/h channels of each of h heads.

    Queries and keys are normalised along the tokens, so the attention matrix, (D/h, D/h), holds cosines;
    ``temperature`` is the inverse of the paper's tau.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, attn_drop: float = 0.0, drop: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # each (B, h, N, D/h)
        if not torch.compiler.is_compiling():  # one copy for every product; compiled ones copy where they compute
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if q.dtype == torch.float16:  # keeps sums over tokens in its range; cosines stay the same
            q, k = q * q.shape[2] ** -0.5, k * k.shape[2] ** -0.5
        # the norms divide the products of channels, not the tokens, of which there are more
        q_norm, k_norm = (torch.linalg.vector_norm(t, dim=2).clamp_min(1e-12) for t in (q, k))
        cosines = q.transpose(2, 3) @ k / (q_norm[..., :, None] * k_norm[..., None, :])
        attention = self.attn_drop((cosines * self.temperature).softmax(dim=-1))
        out = v @ attention.transpose(2, 3)
        return self.drop(self.proj(out.transpose(1, 2).flatten(2)))


class LPI(nn.Module):
    """Local patch interaction (section 3.3): two depthwise 3x3 convolutions over the grid of tokens."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        grid = x.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)  # a view: channels last in memory
        grid = self.conv2(self.bn(self.act(self.conv1(grid))))
        return grid.flatten(2).transpose(1, 2)


def layer_norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6)


class XCABlock(nn.Module):
    """Cross-covariance attention, local patch interaction, MLP, in this order, each a residual with LayerScale.

    Args:
        eta: Initial value of LayerScale.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        eta: float = 1.0,
    ):
        super().__init__()
        self.gamma1 = nn.Parameter(eta * torch.ones(dim))
        self.gamma2 = nn.Parameter(eta * torch.ones(dim))
        self.gamma3 = nn.Parameter(eta * torch.ones(dim))
        self.norm1 = layer_norm(dim)
        self.attn = XCA(dim, num_heads, qkv_bias, attn_drop, drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.norm3 = layer_norm(dim)
        self.local_mp = LPI(dim)

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        x = torch.addcmul(x, self.gamma1, self.drop_path(self.attn(self.norm1(x))))
        x = torch.addcmul(x, self.gamma3, self.drop_path(self.local_mp(self.norm3(x), rows, columns)))
        return torch.addcmul(x, self.gamma2, self.drop_path(self.mlp(self.norm2(x))))


class ClassAttention(nn.Module):
    """Attention of the class token to all tokens, itself included (CaiT): (B, 1 + N, D) -> (B, 1, D)."""

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, attn_drop: float = 0.0, drop: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query_key_value(x)
        out = F.dropout(self.weights(q, k), self.attn_drop, self.training) @ v  # one row: nothing to fuse
        return self.drop(self.proj(out.transpose(1, 2).flatten(2)))

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The query of the class token, (B, h, 1, D/h), keys and values of all tokens, (B, h, 1 + N, D/h)."""
        dim, weight, bias = x.shape[2], self.qkv.weight, self.qkv.bias
        q = F.linear(x[:, :1], weight[:dim], None if bias is None else bias[:dim])
        k, v = F.linear(x, weight[dim:], None if bias is None else bias[dim:]).chunk(2, dim=2)
        return tuple(t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))

    def attention(self, x: Tensor) -> Tensor:
        """The weights themselves: (B, h, 1 + N), a sum of 1 per head."""
        q, k, _ = self.query_key_value(x)
        return self.weights(q, k)[:, :, 0]

    @staticmethod
    def weights(q: Tensor, k: Tensor) -> Tensor:
        """softmax(qK^T / sqrt(D/h)): (B, h, 1, 1 + N)."""
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


class ClassAttentionBlock(nn.Module):
    """Class attention and an MLP on the class token, as the released networks have them.

    Two things look odd and are part of every released weight: the second norm comes before the residual branches off,
    and patch tokens, to which nothing else is added, are added to themselves.

    Args:
        eta: Initial value of LayerScale; None: no LayerScale.
        tokens_norm: Whether the second norm applies to all tokens or to the class token only.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        eta: float | None = 1.0,
        tokens_norm: bool = False,
    ):
        super().__init__()
        if eta is None:
            self.gamma1 = self.gamma2 = 1.0
        else:
            self.gamma1 = nn.Parameter(eta * torch.ones(dim))
            self.gamma2 = nn.Parameter(eta * torch.ones(dim))
        self.norm1 = layer_norm(dim)
        self.attn = ClassAttention(dim, num_heads, qkv_bias, attn_drop, drop)
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.tokens_norm = tokens_norm

    def forward(self, x: Tensor) -> Tensor:
        """All tokens, (B, 1 + N, D)."""
        normed = self.norm1(x)
        patches = x[:, 1:] + self.gamma1 * normed[:, 1:]
        if self.tokens_norm:
            patches = self.norm2(patches)
        return torch.cat([self._class_token(x, normed), 2 * patches], dim=1)

    def class_token(self, x: Tensor) -> Tensor:
        """The class token only, (B, 1, D): all that the last block has to compute."""
        return self._class_token(x, self.norm1(x))

    def _class_token(self, x: Tensor, normed: Tensor) -> Tensor:
        token = self.norm2(x[:, :1] + self.gamma1 * self.attn(normed))
        return token + self.gamma2 * self.mlp(token)


class Trunk(nn.Module):
    """Patch embedding, positions and XCA blocks: what classifiers and dense networks have in common.

    Args:
        patch_size: 8 or 16 pixels.
        eta: Initial value of LayerScale.
        drop_path_rate: Stochastic depth, the same in all blocks.
        use_pos: Whether tokens are told where they are.
    """

    def __init__(
        self,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        eta: float = 1.0,
        use_pos: bool = True,
    ):
        super().__init__()
        self.patch_size, self.embed_dim = patch_size, embed_dim
        self.patch_embed = ConvPatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            XCABlock(embed_dim, num_heads, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate, drop_path_rate, eta)
            for _ in range(depth)
        )
        self.use_pos = use_pos
        self.pos_embeder = FourierPositions(embed_dim)  # spelt as in the checkpoints, which have it in any case
        self.pos_embeder.requires_grad_(use_pos)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens with their positions, (B, N, D), and the grid (rows, columns)."""
        tokens, (rows, columns) = self.patch_embed(images)
        if self.use_pos:
            tokens = tokens + self.pos_embeder(rows, columns)
        return self.pos_drop(tokens), (rows, columns)


class XCiT(Trunk):
    """The image classifier: trunk, class-attention blocks, linear head.

    Args:
        num_classes: 0 for no head: the network then maps images to features.
        cls_attn_layers: Class-attention blocks.
        tokens_norm: See :class:`ClassAttentionBlock`; False in the nano networks only.
        img_size: Taken for the sake of other networks' callers and not used: any size works.
        trunk: Arguments of :class:`Trunk`.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        cls_attn_layers: int = 2,
        tokens_norm: bool = True,
        img_size: int | None = None,
        **trunk,
    ):
        super().__init__(**trunk)
        first = self.blocks[0]
        self.num_classes, self.num_features = num_classes, self.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(
                self.embed_dim,
                first.attn.num_heads,
                trunk.get("mlp_ratio", 4.0),
                first.attn.qkv.bias is not None,
                trunk.get("drop_rate", 0.0),
                trunk.get("attn_drop_rate", 0.0),
                trunk.get("eta", 1.0),
                tokens_norm,
            )
            for _ in range(cls_attn_layers)
        )
        self.norm = layer_norm(self.embed_dim)
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        # last in the order of parameters, by which optimisers' states in published checkpoints are numbered
        self.register_module("pos_embeder", self._modules.pop("pos_embeder"))

        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        """Names that timm's optimisers do not decay, besides biases and vectors."""
        return {"cls_token"}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A new head, with the initial weights of one."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        init_linear(self.head)
        self.head.to(self.cls_token.device)

    def forward_tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Class token and patch tokens before the class-attention blocks, (B, 1 + N, D), and the grid."""
        x, grid = self.embed(images)
        for block in self.blocks:
            x = block(x, *grid)
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1), grid

    def forward_features(self, images: Tensor) -> Tensor:
        """The class token after the last norm, (B, D)."""
        x, _ = self.forward_tokens(images)
        for block in self.cls_attn_blocks[:-1]:
            x = block(x)
        if len(self.cls_attn_blocks):
            x = self.cls_attn_blocks[-1].class_token(x)
        return self.norm(x[:, 0])

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W), in training too."""
        return self.head(self.forward_features(images))

    @torch.no_grad()
    def class_attention(self, images: Tensor) -> Tensor:
        """Attention of the class token to the patches in the last block: (B, heads, rows, columns).

        The share of the class token itself is missing from the sum of 1.
        """
        x, grid = self.forward_tokens(images)
        for block in self.cls_attn_blocks[:-1]:
            x = block(x)
        last = self.cls_attn_blocks[-1]
        return last.attn.attention(last.norm1(x))[:, :, 1:].unflatten(2, grid)


# Published networks (table 1): D, blocks, heads, initial LayerScale. The patch size is the suffix of their names.
SIZES = {
    "nano_12": dict(embed_dim=128, depth=12, num_heads=4, eta=1.0, tokens_norm=False),
    "tiny_12": dict(embed_dim=192, depth=12, num_heads=4, eta=1.0),
    "tiny_24": dict(embed_dim=192, depth=24, num_heads=4, eta=1e-5),
    "small_12": dict(embed_dim=384, depth=12, num_heads=8, eta=1.0),
    "small_24": dict(embed_dim=384, depth=24, num_heads=8, eta=1e-5),
    "medium_24": dict(embed_dim=512, depth=24, num_heads=8, eta=1e-5),
    "large_24": dict(embed_dim=768, depth=24, num_heads=16, eta=1e-5),
}
ARCHITECTURES = tuple(f"xcit_{size}_p{patch_size}" for size in SIZES for patch_size in (16, 8))


def architecture(name: str) -> dict:
    """Size, depth and patch size of a published network, as arguments of :class:`XCiT`.

    Raises:
        ValueError: If there is no such network.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"{name} is none of {', '.join(ARCHITECTURES)}")
    size, _, patch_size = name.removeprefix("xcit_").rpartition("_p")
    return SIZES[size] | {"patch_size": int(patch_size)}


def build_xcit(name: str, **kwargs) -> XCiT:
    """A published network by name, with random weights; ``kwargs`` are further arguments of :class:`XCiT`."""
    return XCiT(**architecture(name) | kwargs)


xcit_nano_12_p16 = functools.partial(build_xcit, "xcit_nano_12_p16")
xcit_nano_12_p8 = functools.partial(build_xcit, "xcit_nano_12_p8")
xcit_tiny_12_p16 = functools.partial(build_xcit, "xcit_tiny_12_p16")
xcit_tiny_12_p8 = functools.partial(build_xcit, "xcit_tiny_12_p8")
xcit_tiny_24_p16 = functools.partial(build_xcit, "xcit_tiny_24_p16")
xcit_tiny_24_p8 = functools.partial(build_xcit, "xcit_tiny_24_p8")
xcit_small_12_p16 = functools.partial(build_xcit, "xcit_small_12_p16")
xcit_small_12_p8 = functools.partial(build_xcit, "xcit_small_12_p8")
xcit_small_24_p16 = functools.partial(build_xcit, "xcit_small_24_p16")
xcit_small_24_p8 = functools.partial(build_xcit, "xcit_small_24_p8")
xcit_medium_24_p16 = functools.partial(build_xcit, "xcit_medium_24_p16")
xcit_medium_24_p8 = functools.partial(build_xcit, "xcit_medium_24_p8")
xcit_large_24_p16 = functools.partial(build_xcit, "xcit_large_24_p16")
xcit_large_24_p8 = functools.partial(build_xcit, "xcit_large_24_p8")
