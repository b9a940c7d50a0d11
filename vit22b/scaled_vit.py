"""The Vision Transformer that was scaled to 22 billion parameters (section 2).

Needs torch and :mod:`shared.networks.vit_parts`. B images, N tokens of each, D channels per token, F channels inside
the MLP, d = D / heads channels of a head.

Each block keeps two matrices, whatever its switches compute with them: ``weight_in`` (queries, keys, values and the
first layer of the MLP, one below the other) and ``weight_out`` (output of the attention and second layer of the MLP,
side by side). Blocks that differ in switches have the same weights, but for the second norm of sequential ones.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.networks.vit_parts import interpolate_positions, scaled_dot_product_attention

SIZES = {  # width, depth, hidden channels of the MLPs, heads
    "micro": (128, 4, 512, 4),  # for images of 32 pixels
    "ti": (192, 12, 768, 3),
    "s": (384, 12, 1536, 6),
    "b": (768, 12, 3072, 12),
    "l": (1024, 24, 4096, 16),
    "g": (1664, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
    "22b": (6144, 48, 24576, 48),
}
NORMS = ("rmsnorm", "layernorm_nobias", "layernorm")
EPS = 1e-6

# --- One network on several processes ---------------------------------------------------------------------------------


class Share:
    """The heads, MLP channels and tokens of one process among ``count`` that hold a network together.

    This one is the whole network, or has the shapes of a part, which is what measuring on the meta device needs;
    :class:`vit22b.mesh.MeshShare` talks to the other processes.
    """

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count

    def gather(self, x: Tensor) -> Tensor:
        """This process's tokens (B, N / count, D) to those of all, whose gradients every process has a part of."""
        return x if self.count == 1 else x.repeat(1, self.count, 1)

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over the processes of (B, N, D), of which each keeps its tokens."""
        return x if self.count == 1 else x[:, : x.shape[1] // self.count]

    def all_tokens(self, x: Tensor) -> Tensor:
        """The same for what every process then computes alike."""
        return self.gather(x)

    def own_tokens(self, x: Tensor) -> Tensor:
        """The tokens of this process among (B, N, D), which all processes have computed alike."""
        return self.reduce(x)

    def rows(self, sizes: tuple[int, ...]) -> Tensor:
        """The rows of process 0, then of 1, ...: each has a part of every piece of a matrix, pieces of these sizes."""
        pieces = torch.arange(sum(sizes), device="cpu").split(sizes)
        return torch.cat([piece.chunk(self.count)[i] for i in range(self.count) for piece in pieces])

    def own(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """This process's rows."""
        if self.count == 1:
            return x
        return x[self.rows(sizes).chunk(self.count)[self.index].to(x.device, non_blocking=True)]

    def check(self, **lengths: int) -> None:
        """Raise ``ValueError`` if one of these cannot be divided evenly among the processes."""
        for name, length in lengths.items():
            if length % self.count:
                what = f"{length} {name.replace('_', ' ')} cannot be divided among"
                raise ValueError(f"{what} {self.count} processes, the model axis of the mesh")


def local(parameter: Tensor, summed: bool = False) -> Tensor:
    """What this process holds of a parameter that is distributed over a mesh; any other one as it is.

    With ``summed`` the process sees its own tokens or heads only: gradients are those of all processes together.
    """
    if not hasattr(type(parameter), "to_local"):  # of the type, which compiled code asks for as well
        return parameter
    from torch.distributed.tensor import Partial

    return parameter.to_local(grad_placements=[Partial()] if summed else None)


# --- Parts ------------------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """Normalises the last dimension by the root of the mean square, or centred as well, with a learned scale.

    That is called ``scale``, or ``weight`` where tokens are centred, so that a file of weights tells the kind. With
    ``shared_out`` each process of several normalises some of the tokens or heads.
    """

    def __init__(self, dim: int, kind: str, shared_out: bool = True):
        super().__init__()
        if kind not in NORMS:
            raise ValueError(f"norm {kind!r} is none of {', '.join(NORMS)}")
        self.kind, self.name, self.summed = kind, "scale" if kind == "rmsnorm" else "weight", shared_out
        self.register_parameter(self.name, nn.Parameter(torch.empty(dim)))
        self.bias = nn.Parameter(torch.empty(dim)) if kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        scale = local(getattr(self, self.name), self.summed)
        if self.kind == "rmsnorm":
            return F.rms_norm(x, scale.shape, scale.to(x.dtype), EPS)
        bias = None if self.bias is None else local(self.bias, self.summed)
        return F.layer_norm(x, scale.shape, scale, bias, EPS)


class Linear(nn.Linear):
    """Computed alike by all processes of a network."""

    def reset_parameters(self) -> None:
        """The network draws all initial values."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local(self.weight), None if self.bias is None else local(self.bias))


class Attend(nn.Module):
    """softmax(QK^T / sqrt(d)) V: (B, heads, N, d) -> (B, heads, N, d). A module, so that it can be looked at."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)


@dataclass(frozen=True)
class Switches:
    """What is computed in a block; the defaults are the paper's.

    Attributes:
        parallel: Attention and MLP see the same tokens, and one sum is added; else one after the other.
        fused: Both share their products, one at the input and one at the output; needs ``parallel``.
        qk_norm: Over the channels of a head, with a scale that all heads share.
        qkv_bias, out_bias, mlp_bias: Of queries, keys and values; of the attention's output; of both layers of the MLP.
        gelu: ``tanh`` or ``none``, the exact function.
    """

    parallel: bool = True
    fused: bool = True
    qk_norm: bool = True
    norm: str = "rmsnorm"
    qkv_bias: bool = False
    out_bias: bool = True
    mlp_bias: bool = True
    gelu: str = "tanh"

    def __post_init__(self) -> None:
        if self.fused and not self.parallel:
            raise ValueError("fused products need the parallel block: its attention and MLP have one input")


class Block(nn.Module):
    """x + Attention(Norm(x)) + MLP(Norm(x)), or one after the other.

    Each process of several has some of the heads and of the MLP's channels, and some of the tokens between blocks: a
    parallel block gathers them once and adds up what was computed once.
    """

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, switches: Switches, share: Share | None = None):
        super().__init__()
        self.share = share = share or Share()
        if dim % num_heads:
            raise ValueError(f"a width of {dim} cannot be split into {num_heads} heads")
        share.check(heads=num_heads, channels_of_the_MLP=hidden_dim)
        self.switches, self.head_dim = switches, dim // num_heads
        self.pieces_in, self.pieces_out = (dim, dim, dim, hidden_dim), (dim, hidden_dim)
        self.sizes = [piece // share.count for piece in self.pieces_in]
        self.norm = Norm(dim, switches.norm)
        self.mlp_norm = None if switches.parallel else Norm(dim, switches.norm)
        self.weight_in = nn.Parameter(torch.empty(sum(self.sizes), dim))
        self.weight_out = nn.Parameter(torch.empty(dim, sum(self.pieces_out) // share.count))
        lengths = {"qkv_bias": 3 * dim, "hidden_bias": hidden_dim, "attention_bias": dim, "mlp_bias": dim}
        wanted = (switches.qkv_bias, switches.mlp_bias, switches.out_bias, switches.mlp_bias)
        for (name, length), has_bias in zip(lengths.items(), wanted, strict=True):
            setattr(self, name, nn.Parameter(torch.empty(length)) if has_bias else None)
        self.q_norm, self.k_norm = (
            Norm(self.head_dim, switches.norm) if switches.qk_norm else nn.Identity() for _ in "qk"
        )
        self.attend = Attend()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        y = self.share.gather(self.norm(x))
        if self.switches.parallel:
            return x + self.share.reduce(self.both(y) if self.switches.fused else self.attention(y) + self.mlp(y))
        x = x + self.share.reduce(self.attention(y))
        return x + self.share.reduce(self.mlp(self.share.gather(self.mlp_norm(x))))

    def both(self, y: Tensor) -> Tensor:
        """Attention and MLP in two products: (B, N, D) -> (B, N, D), or this process's part of that sum."""
        q, k, v, hidden = F.linear(y, local(self.weight_in), self.bias_in(y)).split(self.sizes, dim=-1)
        inner = torch.cat([self.heads(q, k, v), F.gelu(hidden, approximate=self.switches.gelu)], dim=-1)
        return F.linear(inner, local(self.weight_out), self.bias_out(self.attention_bias, self.mlp_bias))

    def attention(self, y: Tensor) -> Tensor:
        width = sum(self.sizes[:3])
        q, k, v = F.linear(y, local(self.weight_in)[:width], self.bias_in(y)[:width]).split(self.sizes[:3], dim=-1)
        weight = local(self.weight_out)[:, : self.sizes[0]]
        return F.linear(self.heads(q, k, v), weight, self.bias_out(self.attention_bias))

    def mlp(self, y: Tensor) -> Tensor:
        width = sum(self.sizes[:3])
        hidden = F.linear(y, local(self.weight_in)[width:], self.bias_in(y)[width:])
        hidden = F.gelu(hidden, approximate=self.switches.gelu)
        return F.linear(hidden, local(self.weight_out)[:, self.sizes[0] :], self.bias_out(self.mlp_bias))

    def heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of queries, keys and values, each (B, N, heads * d), to the same shape."""
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        return self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)

    def bias_in(self, y: Tensor) -> Tensor:
        """Of the first product of ``y``, zeros where there is none."""
        lengths = (sum(self.pieces_in[:3]), self.pieces_in[3])
        biases = zip((self.qkv_bias, self.hidden_bias), lengths, strict=True)
        whole = torch.cat([y.new_zeros(n) if bias is None else local(bias, True) for bias, n in biases])
        return self.share.own(whole, self.pieces_in)

    def bias_out(self, *biases: Tensor | None) -> Tensor | None:
        """Of the second product; each process adds its part of it."""
        biases = [local(bias, True) for bias in biases if bias is not None]
        return sum(biases[1:], biases[0]) / self.share.count if biases else None


class AttentionPool(nn.Module):
    """One learned query attends to all tokens ("MAP"), and an MLP is added to what it finds."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, switches: Switches):
        super().__init__()
        self.head_dim, self.gelu = dim // num_heads, switches.gelu
        self.probe = nn.Parameter(torch.empty(1, dim))
        self.q = Linear(dim, dim, bias=switches.qkv_bias)
        self.kv = Linear(dim, 2 * dim, bias=switches.qkv_bias)
        self.proj = Linear(dim, dim, bias=switches.out_bias)
        self.norm = Norm(dim, switches.norm, shared_out=False)
        self.fc1 = Linear(dim, hidden_dim, bias=switches.mlp_bias)
        self.fc2 = Linear(hidden_dim, dim, bias=switches.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)."""
        q, k, v = self.q(local(self.probe).expand(len(x), 1, -1)), *self.kv(x).chunk(2, dim=-1)
        q, k, v = (tokens.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for tokens in (q, k, v))
        found = self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))[:, 0]
        return found + self.fc2(F.gelu(self.fc1(self.norm(found)), approximate=self.gelu))


class Patches(nn.Conv2d):
    """Square patches, each mapped linearly to a token, and a learned position added to each."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, dim: int):
        if img_size < patch_size:
            raise ValueError(f"a patch of {patch_size} pixels is larger than an image of {img_size}")
        super().__init__(in_chans, dim, patch_size, stride=patch_size)
        self.patch_size, self.grid = patch_size, (img_size // patch_size,) * 2
        self.positions = nn.Parameter(torch.empty(1, math.prod(self.grid), dim))

    def reset_parameters(self) -> None:
        """The network draws all initial values."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D), row by row; positions are interpolated for another grid."""
        if min(images.shape[-2:]) < self.patch_size:
            size = "x".join(map(str, images.shape[-2:]))
            raise ValueError(f"a patch of {self.patch_size} pixels is larger than an image of {size}")
        tokens = F.conv2d(images, local(self.weight), local(self.bias), stride=self.patch_size)
        positions = interpolate_positions(local(self.positions), *tokens.shape[-2:], self.grid)
        return tokens.flatten(2).transpose(1, 2) + positions


# --- Network ----------------------------------------------------------------------------------------------------------


class ScaledViT(nn.Module):
    """Patches, blocks, a norm, one vector for the image, a classifier.

    Args:
        width, depth, hidden_dim, num_heads: D, number of blocks, F, attention heads.
        patch_size, img_size: Sides in pixels; other images have their positions interpolated.
        num_classes: Outputs of the classifier; 0: none, the network gives representations.
        pool: ``map`` (:class:`AttentionPool`) or ``gap``, the mean of the tokens.
        head_bias: Initial bias of the classifier.

    Raises:
        ValueError: If sizes do not fit each other, or cannot be divided among the processes.
    """

    def __init__(
        self,
        width: int = 384,
        depth: int = 12,
        hidden_dim: int = 1536,
        num_heads: int = 6,
        patch_size: int = 14,
        img_size: int = 224,
        num_classes: int = 0,
        pool: str = "map",
        switches: Switches | None = None,
        head_bias: float = 0.0,
        in_chans: int = 3,
        share: Share | None = None,
    ):
        super().__init__()
        if pool not in ("map", "gap"):
            raise ValueError(f"pool {pool!r} is neither map nor gap")
        switches, self.share, self.head_bias = switches or Switches(), share or Share(), head_bias
        self.patches = Patches(img_size, patch_size, in_chans, width)
        self.share.check(tokens=self.patches.positions.shape[1])
        blocks = (Block(width, num_heads, hidden_dim, switches, self.share) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = Norm(width, switches.norm)
        self.pool = AttentionPool(width, num_heads, hidden_dim, switches) if pool == "map" else None
        self.head = Linear(width, num_classes) if num_classes else nn.Identity()
        if self.share.count == 1 and not self.patches.bias.is_meta:
            with torch.no_grad():
                for name, value in self.initial_values():
                    self.get_parameter(name).copy_(value)

    def encode(self, images: Tensor) -> Tensor:
        """Normalised tokens of the last block: (B, C, H, W) -> (B, N, D)."""
        tokens = self.share.own_tokens(self.patches(images))
        return self.share.all_tokens(self.norm(self.blocks(tokens)))

    def represent(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D)."""
        tokens = self.encode(images)
        return tokens.mean(dim=1) if self.pool is None else self.pool(tokens)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, classes), or representations (B, D) without a classifier."""
        return self.head(self.represent(images))

    def pieces(self, name: str) -> tuple[int, tuple[int, ...]] | None:
        """The dimension in which processes share a parameter, and the lengths of its pieces there; None for others."""
        fused = {"weight_in": (0, self.blocks[0].pieces_in), "weight_out": (1, self.blocks[0].pieces_out)}
        return fused.get(name.rpartition(".")[2])

    def initial_values(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole initial values of all parameters, drawn one after the other from torch's generator.

        Xavier for every matrix by itself, ones for scales, zeros for biases and the classifier.
        """
        for name, parameter in self.named_parameters():
            shape, pieces, last = list(parameter.shape), self.pieces(name), name.rpartition(".")[2]
            if pieces is not None:
                shape[pieces[0]] = sum(pieces[1])
            value = torch.zeros(shape, device="cpu")
            if pieces is not None:
                for piece in value.split(pieces[1], dim=pieces[0]):
                    nn.init.xavier_uniform_(piece)
            elif name in ("patches.weight", "patches.positions"):
                nn.init.normal_(value, std=(value[0].numel() if value.dim() == 4 else shape[-1]) ** -0.5)
            elif value.dim() == 1 and last in ("scale", "weight"):
                nn.init.ones_(value)
            elif name == "head.bias":
                nn.init.constant_(value, self.head_bias)
            elif value.dim() > 1 and name != "head.weight":
                for matrix in value.chunk(2 if name == "pool.kv.weight" else 1):
                    nn.init.xavier_uniform_(matrix)
            yield name, value


def fuse(pieces: dict[str, Tensor]) -> dict[str, Tensor]:
    """The two matrices of a block from ``q``, ``k``, ``v``, ``attention_out``, ``mlp_in`` and ``mlp_out``.

    Each is (outputs, inputs).
    """
    weight_in = torch.cat([pieces[name] for name in ("q", "k", "v", "mlp_in")])
    return {"weight_in": weight_in, "weight_out": torch.cat([pieces["attention_out"], pieces["mlp_out"]], dim=1)}


def unfuse(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back, of ``weight_in`` and ``weight_out``."""
    dim = len(weights["weight_out"])
    q, k, v, mlp_in = weights["weight_in"].split([dim, dim, dim, len(weights["weight_in"]) - 3 * dim])
    attention_out, mlp_out = weights["weight_out"].tensor_split([dim], dim=1)
    return {"q": q, "k": k, "v": v, "attention_out": attention_out, "mlp_in": mlp_in, "mlp_out": mlp_out}
