"""Encoder-decoders for translation: ResMLP's blocks in place of self-attention, and a Transformer beside them.

The decoder looks at the encoded source by attention in both; what differs is how the tokens of one sentence
communicate: one learned matrix over positions, the same for every sentence (ResMLP), or self-attention.

B sentences, M source tokens, N target tokens, D channels, L the longest sentence.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.networks.vit_parts import Mlp, init_linear, scaled_dot_product_attention

from ..resmlp_models import Affine

PAD, UNK, BOS, EOS = range(4)  # ids of every vocabulary
NETWORKS = ("resmlp", "transformer")


class CrossTokenLinear(nn.Module):
    """One linear layer across the tokens of a sentence, the same for every channel.

    A sentence of n tokens takes the first n rows and columns of the matrix; padding does not contribute, and in a
    decoder no token receives anything from a later one.
    """

    def __init__(self, max_length: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.weight = nn.Parameter(torch.empty(max_length, max_length))
        self.bias = nn.Parameter(torch.zeros(max_length))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D); ``padding`` (B, N) is true where there is no token."""
        length = x.shape[1]
        weight = self.weight[:length, :length]
        if self.causal:
            weight = weight.tril()
        return torch.matmul(weight, x.masked_fill(padding[..., None], 0)) + self.bias[:length, None]


class Attention(nn.Module):
    """Multi-head attention of one sequence of tokens to another, or to itself (Vaswani et al. 2017)."""

    def __init__(self, dim: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """Queries of ``x`` (B, N, D), keys and values of ``memory`` (B, M, D) where ``padding`` (B, M) is false."""
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, D / heads)
        key, value = self.key_value(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        allowed = ~padding[:, None, None]
        if self.causal:
            allowed = allowed & allowed.new_ones(x.shape[1], memory.shape[1]).tril()
        out = scaled_dot_product_attention(query, key, value, allowed=allowed)
        return self.proj(out.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    """Attention among the tokens of a sentence; called like :class:`CrossTokenLinear`."""

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return super().forward(x, x, padding)


class Residual(nn.Module):
    """``x + gamma * branch(norm(x))``: an affine layer and LayerScale for ResMLP, a LayerNorm without gamma else."""

    def __init__(self, branch: nn.Module, dim: int, dropout: float, layer_scale: float | None):
        super().__init__()
        self.norm = nn.LayerNorm(dim) if layer_scale is None else Affine(dim)
        self.branch = branch
        self.dropout = nn.Dropout(dropout)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        out = self.dropout(self.branch(self.norm(x), *context))
        return x + out if self.gamma is None else torch.addcmul(x, self.gamma, out)


class Translator(nn.Module):
    """Encoder and decoder with one embedding matrix for source, target and output.

    ResMLP has no position embeddings, its matrices know the positions; the Transformer adds the sinusoidal ones.

    Args:
        vocabulary_size: Subwords, the same for both languages.
        max_length: Most tokens of a sentence with its end, L.
        network: ``resmlp`` or ``transformer``.
        dim: Channels D.
        hidden_dim: Hidden channels of the MLPs; the Transformer takes fewer, see :func:`equal_hidden_dim`.
        depth: Layers of the encoder, and of the decoder.
        heads: Heads of every attention.
        dropout: On every residual branch and on the embeddings.
        layer_scale: Initial LayerScale of ResMLP.

    The defaults are ours, not verified against the authors' code.
    """

    def __init__(
        self,
        vocabulary_size: int,
        max_length: int = 128,
        network: str = "resmlp",
        dim: int = 512,
        hidden_dim: int = 2048,
        depth: int = 6,
        heads: int = 8,
        dropout: float = 0.15,
        layer_scale: float = 0.2,
    ):
        super().__init__()
        if network not in NETWORKS:
            raise ValueError(f"--network {network} is none of {', '.join(NETWORKS)}")
        if dim % (2 * heads):
            raise ValueError(f"--dim {dim} is no multiple of twice the {heads} heads of --heads")
        is_resmlp = network == "resmlp"
        if not is_resmlp:
            hidden_dim = equal_hidden_dim(dim, hidden_dim, max_length)
        self.max_length, self.dim = max_length, dim
        self.embedding = nn.Embedding(vocabulary_size, dim, padding_idx=PAD)
        self.dropout = nn.Dropout(dropout)
        positions = torch.zeros(max_length, dim) if is_resmlp else sinusoidal_positions(max_length, dim)
        self.register_buffer("positions", positions, persistent=False)

        def residual(branch: nn.Module) -> Residual:
            return Residual(branch, dim, dropout, layer_scale if is_resmlp else None)

        def mixing(causal: bool) -> Residual:
            return residual(CrossTokenLinear(max_length, causal) if is_resmlp else SelfAttention(dim, heads, causal))

        self.encoder = nn.ModuleList(
            nn.ModuleList([mixing(causal=False), residual(Mlp(dim, hidden_dim))]) for _ in range(depth)
        )
        self.decoder = nn.ModuleList(
            nn.ModuleList([mixing(causal=True), residual(Attention(dim, heads)), residual(Mlp(dim, hidden_dim))])
            for _ in range(depth)
        )
        self.encoder_norm = Affine(dim) if is_resmlp else nn.LayerNorm(dim)
        self.decoder_norm = Affine(dim) if is_resmlp else nn.LayerNorm(dim)
        self.apply(init_linear)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        nn.init.zeros_(self.embedding.weight[PAD])

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Source ids (B, M) to the memory (B, M, D) and its padding (B, M)."""
        padding = source == PAD
        x = self._embed(source)
        for mix, mlp in self.encoder:
            x = mlp(mix(x, padding))
        return self.encoder_norm(x), padding

    def decode(self, target: Tensor, memory: Tensor, memory_padding: Tensor) -> Tensor:
        """Target ids so far (B, N), the first of them BOS, to logits (B, N, vocabulary) of each next token."""
        padding = target == PAD
        x = self._embed(target)
        for mix, attend, mlp in self.decoder:
            x = mlp(attend(mix(x, padding), memory, memory_padding))
        return F.linear(self.decoder_norm(x), self.embedding.weight)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        """Source ids (B, M) and target ids (B, N) that begin with BOS, to logits (B, N, vocabulary)."""
        source, target = pair
        return self.decode(target, *self.encode(source))

    def _embed(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > self.max_length:
            raise ValueError(f"a sentence of {ids.shape[1]} tokens, the network takes {self.max_length} (--max_length)")
        return self.dropout(self.embedding(ids) * math.sqrt(self.dim) + self.positions[: ids.shape[1]])


def sinusoidal_positions(length: int, dim: int) -> Tensor:
    """Sines and cosines of geometrically spaced frequencies, (length, dim) (Vaswani et al. 2017, section 3.5)."""
    frequencies = 10000 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def equal_hidden_dim(dim: int, hidden_dim: int, max_length: int) -> int:
    """Hidden channels with which a Transformer has as many parameters as ResMLP with ``hidden_dim``.

    Self-attention has 4 D^2 weights where ResMLP has L^2; the MLP with 2 D per hidden channel makes up for it.

    Raises:
        ValueError: If nothing would be left of the MLP.
    """
    equal = hidden_dim - 2 * dim + max_length**2 // (2 * dim)
    if equal < 1:
        raise ValueError(
            f"--hidden_dim {hidden_dim}: a Transformer of --dim {dim} with as many parameters has no MLP; "
            f"give at least {hidden_dim + 1 - equal}"
        )
    return equal
