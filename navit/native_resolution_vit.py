"""The Vision Transformer of NaViT: images of any size and shape, side by side, in one pass.

Needs torch and :mod:`shared.networks.vit_parts`. N are the tokens of all images of a batch, one image after the other
and none of them padding; E images, D channels per token, H heads of d channels, B sequences of L tokens. Grids are
(rows, columns) in patches, coordinates (row, column) of a patch. A text is an image of one row.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.networks.vit_parts import Mlp, heads_of, scaled_dot_product_attention

SIZES = {  # width, blocks, heads
    "micro": (128, 4, 4),  # for images of 32 pixels
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
}
CHOICES = {  # what no tensor shows, as the number of heads
    "positions": ("sum", "product", "stack", "fourier", "table"),
    "coordinates": ("absolute", "fractional", "aspect"),
    "norm": ("layernorm", "rmsnorm"),
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values (N, H, d) -> (N, H, d)

# --- Packed images ----------------------------------------------------------------------------------------------------


def patchify(image: Tensor, patch: int) -> Tensor:
    """Pixels of the patches of an image (C, height, width), row by row: (n, patch * patch * C), channels last."""
    height, width = image.shape[1:]
    if min(height, width) < patch or height % patch or width % patch:
        few = "no patch" if min(height, width) < patch else "no whole number of patches"
        raise ValueError(f"an image of {height}x{width} pixels holds {few} of {patch}: resize it")
    rows, columns = height // patch, width // patch
    return image.reshape(-1, rows, patch, columns, patch).permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)


def coordinates_of(rows: int, columns: int) -> Tensor:
    """Row and column of every patch, row by row: (rows * columns, 2)."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))


def _upload(numbers: Tensor, device: torch.device) -> Tensor:
    """What ``torch.tensor(..., device=device)`` gives, which would wait until a GPU has done all it was given."""
    return numbers.to(device, non_blocking=True)


@dataclass
class Packed:
    """A batch of E images, or of texts, those of one length next to each other."""

    patches: Tensor  # pixels (N, patch * patch * C), or numbers of words (N,)
    coords: Tensor  # of the tokens, (N, 2)
    slots: Tensor  # place of each token in the sequences, counted through all of them, (N,)
    shape: tuple[int, int]  # number of sequences and their length
    lengths: list[int]  # tokens of each image
    grids: list[tuple[int, int]]  # of the whole images, also where tokens were dropped
    order: list[int]  # place of each image among those that were given
    shrunk: Sequence[bool] = ()  # of images to evaluate on, as given: whether they were made smaller to fit

    @classmethod
    def of(
        cls,
        patches: Sequence[Tensor],
        coords: Sequence[Tensor],
        grids: Sequence[tuple[int, int]],
        slots: Tensor | None = None,
        shape: tuple[int, int] | None = None,
    ) -> "Packed":
        """Images given one by one in any order; without ``slots`` and ``shape`` all of them make one sequence."""
        given = [len(p) for p in patches]
        slots, shape = (torch.arange(sum(given)), (1, sum(given))) if slots is None else (slots, shape)
        order = sorted(range(len(given)), key=given.__getitem__)
        tensors = [torch.cat([parts[i] for i in order]) for parts in (patches, coords, slots.split(given))]
        return cls(*tensors, shape, [given[i] for i in order], [grids[i] for i in order], order)

    @classmethod
    def whole(cls, images: Sequence[Tensor], patch: int) -> "Packed":
        """All patches of images (C, height, width)."""
        patches = [patchify(image, patch) for image in images]
        grids = [(image.shape[1] // patch, image.shape[2] // patch) for image in images]
        return cls.of(patches, [coordinates_of(*grid) for grid in grids], grids).to(images[0].device)

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device, non_blocking: bool = True) -> "Packed":
        names = ("patches", "coords", "slots")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names})

    def as_given(self, rows: Tensor) -> Tensor:
        """A row (E, ...) of each image, in the order in which the images were given."""
        return rows.index_select(0, _upload(torch.tensor(self.order).argsort(), rows.device))


# --- Positions (section 2.1) ------------------------------------------------------------------------------------------


def look_up(table: Tensor, places: Tensor) -> Tensor:
    """Rows of a table (T, D) at places (N,) between 0 and T - 1, linear between two of them.

    By ``F.embedding``, here and below: on a CPU the gradient of an indexed table is summed in an order of chance.
    """
    if not places.is_floating_point():
        return F.embedding(places, table)
    low = places.floor().long()
    high = (low + 1).clamp(max=len(table) - 1)
    return torch.lerp(F.embedding(low, table), F.embedding(high, table), (places - low)[:, None].to(table.dtype))


def resized_table(table: Tensor, coords: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> Tensor:
    """A table (T, T, D) resized to the grid of every image, antialiased bilinear, at the coordinates of its tokens."""
    table = table.permute(2, 0, 1)[None]
    resized = {g: F.interpolate(table, g, mode="bilinear", antialias=True)[0].flatten(1).T for g in set(grids)}
    places = zip(coords, grids, strict=True)
    return torch.cat([F.embedding(own[:, 0] * g[1] + own[:, 1], resized[g]) for own, g in places])


class Positions(nn.Module):
    """Embeddings (N, D) of the tokens' places.

    Args:
        kind: ``sum``, ``product`` or ``stack`` (the columns' half of the channels first) of the rows of two tables of
            ``length`` rows, one for rows and one for columns; ``fourier``: sine, then cosine, of (column, row) @ weight
            (2, D / 2); ``table``: of two dimensions, resized to the grid of every image.
        coordinates: ``absolute``: row i of an image is row i of the table; ``fractional``: over the sides of the image;
            ``aspect``: over its longer side.
    """

    half_pixel = False  # fractions r are looked up at r * (T - 1); True: where a resize of the table to the grid would

    def __init__(self, dim: int, kind: str, coordinates: str, length: int):
        super().__init__()
        self.kind, self.coordinates = kind, coordinates
        if kind == "fourier":
            self.weight = nn.Parameter(torch.randn(2, dim // 2))
        elif kind == "table":
            self.table = nn.Parameter(0.02 * torch.randn(length, length, dim))
        else:
            channels, middle = (dim // 2 if kind == "stack" else dim), float(kind == "product")
            self.y, self.x = (nn.Parameter(middle + 0.02 * torch.randn(length, channels)) for _ in "yx")

    @property
    def most_a_side(self) -> float:
        """Patches a side beyond which an image has no positions."""
        return len(self.x) if hasattr(self, "x") and self.coordinates == "absolute" else math.inf

    def fractions(self, packed: Packed, offset: float = 0.0) -> Tensor:
        """Coordinates over the sides of the images, (N, 2)."""
        grids, lengths = (_upload(torch.tensor(v), packed.coords.device) for v in (packed.grids, packed.lengths))
        sides = grids if self.coordinates == "fractional" else grids.amax(dim=1, keepdim=True)
        return (packed.coords + offset) / sides.repeat_interleave(lengths, dim=0, output_size=len(packed.coords))

    def forward(self, packed: Packed) -> Tensor:
        if self.kind == "table":
            return resized_table(self.table, packed.coords.split(packed.lengths), packed.grids)
        places = packed.coords if self.coordinates == "absolute" else self.fractions(packed)
        if self.kind == "fourier":
            angles = places.flip(1).to(self.weight.dtype) @ self.weight
            return torch.cat([angles.sin(), angles.cos()], dim=1)
        most, largest = len(self.x), max(map(max, packed.grids))
        if self.coordinates != "absolute":
            places = places * (most - 1)
            if self.half_pixel:
                places = (self.fractions(packed, 0.5) * most - 0.5).clamp(0, most - 1)
        elif largest > self.most_a_side:
            raise ValueError(f"an image of {largest} patches a side is beyond --max_side {most}, the position tables")
        of_y, of_x = look_up(self.y, places[:, 0]), look_up(self.x, places[:, 1])
        if self.kind == "stack":
            return torch.cat([of_x, of_y], dim=1)
        return of_y + of_x if self.kind == "sum" else of_y * of_x


# --- Attention among the tokens of an image ---------------------------------------------------------------------------


def block_mask(segment_ids: Tensor) -> Tensor:
    """Whether token i may look at j: both of one image; (B, L), 0 for padding -> (B, L, L)."""
    return (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, :, None]


def by_length(function: Callable[..., Tensor], lengths: Sequence[int], *tensors: Tensor) -> Tensor:
    """``function`` of each run of images of one length, (N, ...) as (images, tokens, ...), its rows in order."""
    runs = [(n, len(list(run))) for n, run in itertools.groupby(lengths)]
    parts = zip(*(tensor.split([n * images for n, images in runs]) for tensor in tensors), strict=True)
    shaped = ([t.unflatten(0, (-1, n)) for t in part] for (n, _), part in zip(runs, parts, strict=True))
    return torch.cat([function(*part).flatten(0, 1) for part in shaped])


def heads_first(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Attention of (B, L, H, d)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, allowed=allowed).transpose(1, 2)


def _has_flash_attention(device: torch.device) -> bool:
    known = importlib.util.find_spec("torch.nn.attention.varlen") and torch.is_autocast_enabled(device.type)
    return bool(known) and torch.cuda.get_device_capability(device) >= (8, 0)  # a T4 and a V100 lack it


def attention_among(kind: str, lengths: Sequence[int], slots: Tensor, shape: tuple[int, int]) -> Attend:
    """How tokens look at those of their own image; every kind gives the same numbers.

    Args:
        kind: ``mask``: whole sequences with a block mask; ``segments``: images of one length at a time; ``varlen``:
            flash attention of GPUs in half precision (torch 2.10, compute capability 8); ``auto``: segments on a CPU,
            on a GPU varlen where it can be had, else mask.
        lengths, slots, shape: Of a :class:`Packed`.
    """
    device = slots.device
    if kind == "auto":
        kind = "segments" if device.type in ("cpu", "meta") else "varlen" if _has_flash_attention(device) else "mask"
    if kind == "segments":
        return lambda q, k, v: by_length(heads_first, lengths, q, k, v)
    ends = _upload(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), device)
    if kind == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        return lambda q, k, v: varlen_attn(q, k, v, ends, ends, max(lengths), max(lengths))
    if kind != "mask":
        raise ValueError(f"attention {kind!r} is none of auto, mask, segments, varlen")
    images = torch.arange(1, len(lengths) + 1, device=device).repeat_interleave(ends.diff(), output_size=len(slots))
    ids = images.new_zeros(math.prod(shape)).index_copy(0, slots, images).view(shape)
    allowed = block_mask(ids) | torch.eye(shape[1], dtype=torch.bool, device=device)  # padding: itself

    def masked(*tokens: Tensor) -> Tensor:
        laid_out = (t.new_zeros(ids.numel(), *t.shape[1:]).index_copy(0, slots, t).unflatten(0, shape) for t in tokens)
        return heads_first(*laid_out, allowed[:, None]).flatten(0, 1).index_select(0, slots)

    return masked


# --- Network ----------------------------------------------------------------------------------------------------------


def norm_layer(kind: str, dim: int, bias: bool = False) -> nn.Module:
    """``layernorm``, ``rmsnorm`` or ``none``."""
    if kind == "none":
        return nn.Identity()
    return nn.RMSNorm(dim, eps=1e-6) if kind == "rmsnorm" else nn.LayerNorm(dim, eps=1e-6, bias=bias)


class Attention(nn.Module):
    """Attention whose queries and keys are normalised in every head."""

    def __init__(self, dim: int, num_heads: int, qk_norm: str = "layernorm", bias: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.q_norm, self.k_norm = (norm_layer(qk_norm, dim // num_heads) for _ in "qk")
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(N, D) -> (N, D)."""
        return self.proj(attend(*self.heads(x)).flatten(1))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (N, H, d) of tokens (N, D)."""
        q, k, v = self.qkv(x).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v  # autocast leaves norms in float32


class Block(nn.Module):
    """Attention and MLP, each on normalised tokens and added to them."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, norm: str, qk_norm: str, bias: bool):
        super().__init__()
        self.norm1, self.attn = norm_layer(norm, dim, bias), Attention(dim, num_heads, qk_norm, bias)
        self.norm2, self.mlp = norm_layer(norm, dim, bias), Mlp(dim, hidden_dim)
        self.mlp.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.attn(self.norm1(x), attend)
        return x + self.mlp(self.norm2(x))


class AttentionPool(nn.Module):
    """One learned query attends to all tokens of an image ("MAP"); an MLP is added to what it finds."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, norm: str, bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.randn(1, 1, dim) * dim**-0.5)
        self.q, self.kv = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, 2 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        self.norm, self.mlp = norm_layer(norm, dim, bias), Mlp(dim, hidden_dim)
        self.mlp.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """(N, D) -> (E, D)."""
        q = self.q(self.latent).unflatten(2, (self.num_heads, -1))
        k, v = self.kv(x).unflatten(1, (2, self.num_heads, -1)).unbind(1)
        x = self.proj(by_length(lambda k, v: heads_first(q.expand(len(k), -1, -1, -1), k, v), lengths, k, v).flatten(1))
        return x + self.mlp(self.norm(x))


class NaViT(nn.Module):
    """A ViT for packed images.

    Args:
        width, depth, num_heads: D, number of blocks, H.
        num_classes: Outputs of the classifier; 0: none, the network gives representations.
        hidden_dim: Of the MLPs; by default 4 D.
        positions, coordinates, max_side: Kind of the positions, their coordinates, and length of the tables.
        norm: ``layernorm`` or ``rmsnorm``, without a bias.
        bias: Of queries, keys, values and norms, as the usual ViT has them.
        pool: ``map`` (:class:`AttentionPool`) or ``gap`` (the mean of an image's tokens).
        vocabulary: For texts instead of images: number of words.
    """

    attention = "auto"  # see attention_among

    def __init__(
        self,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        patch_size: int = 16,
        num_classes: int = 0,
        hidden_dim: int | None = None,
        positions: str = "sum",
        coordinates: str = "absolute",
        max_side: int = 64,
        norm: str = "layernorm",
        qk_norm: bool = True,
        bias: bool = False,
        pool: str = "map",
        in_chans: int = 3,
        vocabulary: int = 0,
    ):
        super().__init__()
        chosen = [values.index(v) for v, values in zip((positions, coordinates, norm), CHOICES.values(), strict=True)]
        self.register_buffer("choices", torch.tensor([*chosen, num_heads]))
        hidden_dim = hidden_dim or 4 * width
        self.patch_size, self.width, self.num_classes = patch_size, width, num_classes
        patches = nn.Conv2d(in_chans, width, patch_size, stride=patch_size)
        self.patch_embed = nn.Embedding(vocabulary, width) if vocabulary else patches
        self.pos_embed = Positions(width, positions, coordinates, max_side)
        options = (norm, norm if qk_norm else "none", bias)
        self.blocks = nn.ModuleList(Block(width, num_heads, hidden_dim, *options) for _ in range(depth))
        self.norm = norm_layer(norm, width, bias)
        self.attn_pool = AttentionPool(width, num_heads, hidden_dim, norm, bias) if pool == "map" else None
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        if vocabulary:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(10.0)))  # of similarities with images
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier, queries, keys and values as matrices of their own; biases and the classifier 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                for matrix in module.weight.chunk({"qkv": 3, "kv": 2}.get(name.rpartition(".")[2], 1)):
                    nn.init.xavier_uniform_(matrix)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.patch_embed.weight, std=math.prod(self.patch_embed.weight.shape[1:]) ** -0.5)
        if self.num_classes:
            nn.init.zeros_(self.head.weight)

    def embed(self, packed: Packed) -> Tensor:
        """Tokens with their positions, (N, D)."""
        kernel = self.patch_embed.weight
        if kernel.dim() == 4:
            x = F.linear(packed.patches, kernel.permute(0, 2, 3, 1).flatten(1), self.patch_embed.bias)
        else:
            x = self.patch_embed(packed.patches)
        return x + self.pos_embed(packed)

    def encode(self, packed: Packed) -> Tensor:
        """Normalised tokens of the last block, (N, D)."""
        x, attend = self.embed(packed), attention_among(self.attention, packed.lengths, packed.slots, packed.shape)
        for block in self.blocks:
            x = block(x, attend)
        return self.norm(x)

    def represent(self, images: "Packed | Tensor | Sequence[Tensor]") -> Tensor:
        """Packed images, images (E, C, height, width) of one size or a list of any sizes -> (E, D), as given."""
        packed = images if isinstance(images, Packed) else Packed.whole(images, self.patch_size)
        x = self.encode(packed)
        if self.attn_pool is not None:
            return packed.as_given(self.attn_pool(x, packed.lengths))
        return packed.as_given(by_length(lambda tokens: tokens.mean(dim=1, keepdim=True), packed.lengths, x))

    def forward(self, images: "Packed | Tensor | Sequence[Tensor]") -> Tensor:
        """Logits (E, classes), or representations (E, D) without a classifier; see :meth:`represent`."""
        return self.head(self.represent(images))


class ImageText(nn.Module):
    """A network of images and one of texts; gives representations of unit length, (E, D) both, and their factor."""

    def __init__(self, image: NaViT, text: NaViT):
        super().__init__()
        self.image, self.text = image, text

    def forward(self, images: Packed, texts: Packed) -> tuple[Tensor, Tensor, Tensor]:
        image, text = (F.normalize(x.float(), dim=1) for x in (self.image(images), self.text(texts)))
        return image, text, self.text.log_temperature.exp()


def checkpoint_filter_fn(tensors: Mapping[str, Tensor], network: NaViT | None = None) -> dict[str, Tensor]:
    """Tensors of timm's NaFlexViT for RGB images under this network's names; those of this one stay."""
    found = {name.replace("embeds.proj.", "patch_embed."): value for name, value in tensors.items()}
    if "embeds.pos_embed" in found:
        kernel = found["patch_embed.weight"]  # (D, patch * patch * C)
        side = math.isqrt(kernel.shape[1] // 3)
        found["patch_embed.weight"] = kernel.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2).contiguous()
        found["pos_embed.table"] = found.pop("embeds.pos_embed")[0]
        depth = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
        found["choices"] = torch.tensor([CHOICES["positions"].index("table"), 0, 0, heads_of(len(kernel), depth)])
    return found
