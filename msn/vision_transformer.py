"""Vision Transformer that computes only the patches it keeps, and the projection head of MSN (Assran et al. 2022).

Needs torch and ``shared/networks/vit_parts.py`` only, so the two files can be lifted out alone. Modules and parameters
have the names of the official code, so that released checkpoints load.

    encoder = build("deit_small")
    encoder(torch.randn(8, 3, 224, 224))                        # class tokens, (8, 384)
    encoder(torch.randn(8, 3, 224, 224), patch_drop=0.15)       # from 166 of the 196 patches
    encoder.fc = ProjectionHead(384)                            # now embeddings, (8, 256)

Dropped patches are taken out before the first block: time and memory of the blocks fall with their share.
"""

from collections.abc import Callable
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from shared.networks import vit_parts
from shared.networks.vit_parts import Attention, Mlp, PatchEmbed, init_linear, interpolate_positions


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


class DropPath(vit_parts.DropPath):
    """Stochastic depth that draws uniform numbers: a seed gives the same run as ever."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep_prob = 1 - self.drop_prob
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device) < keep_prob
        return x * keep / keep_prob


class Block(nn.Module):
    """Pre-norm Transformer block: attention, then an MLP, each on a residual branch."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, norm_layer: Callable[[int], nn.Module]
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=True)
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), or (B, num_queries, D) for the first tokens only."""
        x = x[:, :num_queries] + self.drop_path(self.attn(self.norm1(x), num_queries))
        return x + self.drop_path(self.mlp(self.norm2(x)))


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
        """(B, C, H, W) -> (B, patches row by row, D); sides are cut to multiples of 16."""
        height, width = (side // self.patch_size * self.patch_size for side in x.shape[-2:])
        if not (height and width):
            raise ValueError(f"an image of {x.shape[-2]}x{x.shape[-1]} pixels holds no patch of {self.patch_size}")
        return self.stem(x[..., :height, :width]).flatten(2).transpose(1, 2)


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
            outputs.append(self.fc(self.forward_backbone(torch.cat(list(group)), patch_drop if not outputs else 0.0)))
        return torch.cat(outputs)

    def forward_backbone(self, x: Tensor, patch_drop: float = 0.0) -> Tensor:
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
        patches = self.patch_embed(x)
        positions = self.interpolate_pos_encoding(*x.shape[-2:])
        patches = patches + positions[:, 1:]
        if patch_drop:
            kept = draw_kept_patches(patches.shape[1], patch_drop)
            patches = patches.index_select(1, kept.to(x.device, non_blocking=True))
        cls_token = self.cls_token + positions[:, :1]
        return torch.cat([cls_token.expand(x.shape[0], -1, -1), patches], dim=1)

    def interpolate_pos_encoding(self, height: int, width: int) -> Tensor:
        """Positions for images of ``height`` x ``width`` pixels, (1, 1 + patches, D)."""
        patch_size = self.patch_embed.patch_size
        return interpolate_positions(self.pos_embed, height // patch_size, width // patch_size)

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
        return self.encoder.forward_backbone(images)


def init_weights(module: nn.Module) -> None:
    """Linear: normal with standard deviation 0.02, cut at 2; convolutions: He's normal; biases 0."""
    init_linear(module)
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        if module.bias is not None:
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
