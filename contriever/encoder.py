"""The encoder: BERT whose token states are pooled to one vector per text (section 3.1), read from any layout.

Queries and documents share it. The relevance of a document for a query is the inner product of their vectors; there is
no projection head in Contriever. Nothing here talks to a model hub unless ``allow_download`` says so.
"""

import argparse
import json
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from shared.run.packages import need_packages

need_packages(
    "contriever",
    transformers="'transformers>=5'",
    tokenizers="tokenizers",
    bm25s="bm25s",
    pytrec_eval="pytrec-eval-terrier",
    regex="regex",
    Stemmer="PyStemmer",
)

from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertModel,
    ModernBertModel,
    MPNetModel,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    RobertaModel,
    XLMRobertaModel,
)

from shared.networks.weights import BackboneWeights, WeightMismatch, load_backbone_weights, safe_load, weights_checksum
from shared.optimisation.precision import Precision, fast_bf16

from .model_files import WEIGHT_FILES, find_model
from .modules_json import POOLINGS, Steps, read_steps, write_steps
from .text.batches import MOST_TOKENS, longest_first, padded
from .text.normalize import clean

_TOKENIZING = threading.Lock()  # a tokenizer that cuts texts changes, which it refuses while another thread uses it
MIN_TOKENS = {"cpu": 128, "cuda": 16384}  # that keep the matrix products of a forward pass busy


# --- Network ----------------------------------------------------------------------------------------------------------


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector per text, (B, D), from the states of its tokens.

    Args:
        hidden: Last hidden states, shape ``(B, N, D)``.
        mask: True (or 1) where there is a token, shape ``(B, N)``.
        pooling: ``average`` over all tokens, special ones included (the paper's), ``max`` over them, or ``cls``: the
            first token's state.
    """
    if pooling == "cls":
        return hidden[:, 0]
    mask = mask.bool()
    if pooling == "max":
        return hidden.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)
    return hidden.masked_fill(~mask[..., None], 0.0).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def rows_of_similar_length(mask: Tensor) -> list[tuple[Tensor, int]]:
    """Groups of texts that go through the network together, such that less is computed for padding.

    A group, given as its rows and the length of its longest text, has enough tokens to keep the device busy and, on a
    CPU, few enough for its caches. The mask (B, N) is padded on the right.
    """
    least = MIN_TOKENS.get(mask.device.type, mask.numel())
    most = MOST_TOKENS.get(mask.device.type, mask.numel())
    if mask.numel() < 2 * least:
        return [(torch.arange(len(mask), device=mask.device), mask.shape[1])]
    lengths, order = mask.sum(dim=1).sort(descending=True, stable=True)
    lengths = lengths.tolist()
    starts = [0]
    for row, length in enumerate(lengths):
        longest, rows = lengths[starts[-1]], row - starts[-1]
        enough = rows * longest >= least and (len(lengths) - row) * length >= least
        if (rows and (rows + 1) * longest > most) or (enough and length <= 0.9 * longest):
            starts.append(row)
    ends = [*starts[1:], len(lengths)]
    return [(order[start:end], lengths[start]) for start, end in zip(starts, ends, strict=True)]


class _Pooled:
    """What all encoders do: the forward pass of the base class, then :func:`pool`.

    Attributes:
        projections: Dense layers after it, for models of sentence-transformers; Contriever has none.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config, **({} if config.model_type == "modernbert" else {"add_pooling_layer": False}))
        if getattr(config, "pooling", None) is None:
            config.pooling = "average"  # kept in config.json
        if config.pooling not in POOLINGS:
            raise ValueError(f"--pooling must be {' or '.join(POOLINGS)}, got {config.pooling!r}")
        self.projections = nn.Sequential()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, normalize: bool = False
    ) -> Tensor:
        """Vectors (B, D) of texts given as token ids (B, N); with ``normalize`` divided by their L2 norms.

        In training, texts of similar length go through the network together.
        """
        groups = rows_of_similar_length(attention_mask) if self.training and token_type_ids is None else []
        if len(groups) > 1:
            parts = [self.vectors(input_ids[rows, :end], attention_mask[rows, :end]) for rows, end in groups]
            back = torch.cat([rows for rows, _ in groups]).argsort()
            vectors = torch.cat(parts)[back]
        else:
            segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            vectors = self.vectors(input_ids, attention_mask, **segments)
        return nn.functional.normalize(vectors, dim=-1) if normalize else vectors

    def vectors(self, input_ids: Tensor, attention_mask: Tensor, **segments: Tensor) -> Tensor:
        shown = attention_mask
        if self.training and shown.is_cuda and self.config.model_type in ("bert", "xlm-roberta"):
            # the mask that transformers makes of it, which waits for the GPU to see whether it hides anything
            shown = shown.bool()[:, None, None].expand(-1, 1, shown.shape[1], -1)
        states = super().forward(input_ids=input_ids, attention_mask=shown, **segments)
        return self.projections(pool(states.last_hidden_state, attention_mask, self.config.pooling))


class Contriever(_Pooled, BertModel):
    """BERT without its pooler; names of the weights as in the published files."""


ENCODERS = {"bert": Contriever} | {
    model.config_class.model_type: type(f"Pooled{model.__name__}", (_Pooled, model), {})
    for model in (XLMRobertaModel, RobertaModel, MPNetModel, ModernBertModel)
}


def build_encoder(config: PreTrainedConfig, pooling: str | None = None) -> _Pooled:
    """An encoder with random weights; ``pooling`` replaces that of the configuration."""
    if pooling is not None:
        config.pooling = pooling
    if config.model_type not in ENCODERS:
        raise ValueError(f"the model is a {config.model_type}; supported are {', '.join(ENCODERS)}")
    return ENCODERS[config.model_type](config)


# --- Encoding texts ---------------------------------------------------------------------------------------------------


def pad(sequences: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids (B, N), padded on the right to the longest, and their mask: True where there is a token."""
    ids, mask = padded(sequences, pad_id)
    return torch.from_numpy(ids), torch.from_numpy(mask)


@torch.inference_mode()
def encode_tokens(
    encoder: nn.Module,
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    batch_size: int,
    normalize: bool = False,
    amp: str = "fp32",
) -> np.ndarray:
    """Vectors (N, D) in float32 of N lists of token ids, in their order; the encoder is in evaluation mode meanwhile.

    Those of similar length share a batch of ``batch_size`` at most (on a CPU also no more than fit its caches), so that
    hardly anything is computed for padding. The same call gives the same bits again; another grouping of the same texts
    may differ in the last ones.
    """
    device = next(encoder.parameters()).device
    precision = Precision(amp, device)
    was_training = encoder.training
    encoder.eval()
    order, parts = [], []
    for rows in longest_first(sequences, batch_size, MOST_TOKENS.get(device.type)):
        ids, mask = pad([sequences[i] for i in rows], pad_id)
        with precision.autocast():
            parts.append(encoder(ids.to(device), mask.to(device), normalize=normalize).float().cpu())
        order += rows
    encoder.train(was_training)
    return torch.cat(parts).numpy()[np.argsort(order)]


@dataclass
class Retriever:
    """An encoder with its tokenizer.

    Attributes:
        origin: Where the weights come from, for messages.
        normalized: Whether it was trained on L2-normalised vectors (the packaged encoder was, Contriever was not);
            without normalisation such an encoder ranks short texts too high.
        default_length: Tokens that are read of a text if nothing else is said; None: as many as can be read.
        lowercase: Whether texts are lowercased first.
        prompts: What is put before a text: before a ``query``, a ``passage``, or one of which neither is said.
    """

    model: _Pooled
    tokenizer: PreTrainedTokenizerBase
    origin: str
    normalized: bool = False
    default_length: int | None = None
    lowercase: bool = False
    prompts: dict[str, str] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        projections = self.model.projections
        return projections[-1].linear.out_features if projections else self.model.config.hidden_size

    @property
    def max_length(self) -> int:
        """Most tokens that the model can read, special ones included."""
        config = self.model.config
        counts_from_pad = config.model_type in ("xlm-roberta", "roberta", "mpnet")
        return config.max_position_embeddings - (config.pad_token_id + 1 if counts_from_pad else 0)

    @property
    def max_tokens(self) -> int:
        """Tokens that are read of a text if nothing else is said."""
        return self.default_length or self.max_length

    def length(self, flag: str, requested: int) -> int:
        """Most tokens per text; the default of 512 shrinks to what the encoder reads, and nothing else does."""
        if requested > self.max_length and requested != 512:
            raise ValueError(f"{flag} {requested}: {self.origin} reads at most {self.max_length} tokens")
        return min(requested, self.max_length)

    def amp(self, no_fp16: bool) -> str:
        """Number format of the matrix products: half precision where the device is fast in it."""
        if no_fp16 or (self.device.type == "cpu" and not fast_bf16(self.device)):
            return "fp32"
        return "fp16" if self.device.type == "cuda" else "bf16"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def identity(self) -> dict[str, object]:
        """What vectors of passages depend on, besides flags: those of another model do not fit together with them."""
        facts = {"model": weights_checksum(self.model), "pooling": self.model.config.pooling}
        return facts | ({"prefix": prompt} if (prompt := self.prompts.get("passage")) else {})

    def tokenize(self, texts: Sequence[str], max_length: int | None = None, kind: str = "") -> list[list[int]]:
        """Token ids with special tokens; texts that are too long are cut.

        Args:
            max_length: Most tokens per text, by default ``max_tokens``.
            kind: Of the prompt before each text: ``query``, ``passage``, or neither.
        """
        max_length = max_length or self.max_tokens
        if max_length > self.max_length:
            raise ValueError(f"{max_length} tokens per text, but {self.origin} reads at most {self.max_length}")
        texts = clean((self.prompts.get(kind, "") + text for text in texts), self.lowercase, False)
        with _TOKENIZING:
            return self.tokenizer(
                texts, truncation=True, max_length=max_length, return_attention_mask=False, return_token_type_ids=False
            )["input_ids"]

    def token_ends(self, text: str) -> list[int]:
        """Where each token of a text ends, in characters."""
        with _TOKENIZING:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [end for _, end in found["offset_mapping"]]

    def encode(
        self,
        texts: Sequence[str],
        batch_size: int = 64,
        max_length: int | None = None,
        normalize: bool = False,
        amp: str = "auto",
        kind: str = "",
    ) -> np.ndarray:
        """Vectors of texts (N, D), see :func:`encode_tokens` and, for ``max_length`` and ``kind``, :meth:`tokenize`.

        An empty text gets the vector of its special tokens.
        """
        if not len(texts):
            return np.empty((0, self.dim), np.float32)
        sequences = self.tokenize(texts, max_length, kind)
        return encode_tokens(self.model, sequences, self.tokenizer.pad_token_id, batch_size, normalize, amp)

    def save(self, folder: str | Path) -> None:
        """Write the layout of Hugging Face and what sentence-transformers needs to know beside it."""
        model, folder = self.model, Path(folder)
        model.config.normalized = self.normalized
        model.config.architectures = [type(model).__mro__[2].__name__]  # what other programs read it as
        model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        tensors = {n: v.contiguous() for n, v in model.state_dict().items() if not n.startswith("projections.")}
        # save_file makes files for their owner alone
        (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
        steps = Steps(folder, model.config.pooling, model.projections, self.normalized)
        steps.max_length, steps.lowercase = self.max_tokens, self.lowercase
        steps.prompts = self.prompts
        write_steps(folder, steps, model.config.hidden_size)


# --- Reading ----------------------------------------------------------------------------------------------------------


def load_retriever(
    name_or_path: str | Path | None = None,
    *,
    architecture: str | Path | None = None,
    pooling: str | None = None,
    random_init: bool = False,
    allow_download: bool = False,
    device: torch.device | str = "cpu",
) -> Retriever:
    """Read an encoder and its tokenizer, every weight of it, whatever wrote them.

    Args:
        name_or_path: A folder in the Hugging Face layout, a training checkpoint (``checkpoint.pth`` of ``train.py`` or
            ``finetuning.py``, ours or the official ones, or its folder), the name of a model on the Hugging Face hub
            that is in the local cache, or None for the encoder that comes as a Python package.
        architecture: Folder or name that gives configuration and tokenizer for a checkpoint without them (the official
            ones); by default the one that the checkpoint names.
        pooling: ``average`` or ``cls``; by default what the model was trained with.
        random_init: Take configuration and tokenizer only.
        allow_download: Ask the hub for a name that is not in the local cache.

    Raises:
        ValueError: If there is no such model or a file is damaged.
        WeightMismatch: If not every tensor of the network and of the file finds its counterpart.
    """
    path = find_model(name_or_path, allow_download)
    checkpoint_file = path if path.is_file() else path / "checkpoint.pth"
    if checkpoint_file.exists():
        retriever, weights = _from_checkpoint(checkpoint_file, architecture, pooling, allow_download)
        steps = Steps(path)
    else:
        retriever, weights, steps = _from_folder(path, pooling, random_init)
    if not random_init:
        load_backbone_weights(retriever.model, weights)
        retriever.model.projections = steps.projections
    retriever.model.to(device).eval()
    return retriever


def read_config(folder: Path) -> PreTrainedConfig:
    """What ``config.json`` says."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model: neither config.json nor checkpoint.pth")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}") from error


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no tokenizer that can be read: {error}") from error


def _from_folder(path: Path, pooling: str | None, random_init: bool) -> tuple[Retriever, BackboneWeights | None, Steps]:
    steps = read_steps(path)
    described = (path / "modules.json").is_file()
    config = read_config(steps.transformer)
    model = build_encoder(config, pooling or (steps.pooling if described else None))
    normalized = steps.normalized if described else bool(getattr(config, "normalized", False))
    retriever = Retriever(model, read_tokenizer(steps.transformer), str(path), normalized)
    if described:
        length = steps.max_length or retriever.tokenizer.model_max_length
        retriever.default_length = min(length, retriever.max_length)
        retriever.lowercase, retriever.prompts = steps.lowercase, steps.prompts
    tensors = {} if random_init else _read_weights(steps.transformer)
    return retriever, BackboneWeights(*bare_weights(tensors), origin=str(path)) if tensors else None, steps


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return safe_load(folder / name)
        index = folder / f"{name}.index.json"  # large models are cut into several files
        if index.is_file():
            parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {key: value for part in parts for key, value in safe_load(folder / part).items()}
    raise ValueError(f"{folder} holds no weights: none of {', '.join(WEIGHT_FILES)}")


def bare_weights(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights under the names of the bare encoder, and those that belong to heads or buffers.

    Understands BERT with its heads (``bert.``, ``roberta.``; LayerNorm's old gamma and beta), the bare encoder, and the
    three layouts of training: MoCo (``encoder_q.``, ``encoder_k.``, queue), in-batch (``encoder.``) and fine-tuned
    (bare). Only a leading prefix is removed: the encoder has a part of its own that is called ``encoder``.
    """
    tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    prefixes = ("encoder_q.", "bert.", "roberta.", "mpnet.", "model.", "encoder.", "")
    words = ("embeddings.word_embeddings.weight", "embeddings.tok_embeddings.weight")
    prefix = next((p for p in prefixes if any(p + name in tensors for name in words)), None)
    if prefix is None:
        raise WeightMismatch(f"no encoder among these weights: {', '.join(list(tensors)[:5]) or 'none at all'}")
    bare, rest = {}, {}
    for name, value in tensors.items():
        own = name.removeprefix(prefix)
        belongs = name.startswith(prefix) and own.split(".")[0] in ("embeddings", "encoder", "layers", "final_norm")
        if belongs and not own.endswith(("position_ids", "token_type_ids")):  # buffers of old versions
            bare[own.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")] = value
        else:
            rest[name] = value
    return bare, rest


def _from_checkpoint(
    file: Path, architecture: str | Path | None, pooling: str | None, allow_download: bool
) -> tuple[Retriever, BackboneWeights]:
    checkpoint = safe_load(file)
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise ValueError(f"{file} is no checkpoint of train.py or finetuning.py: it has no entry 'model'")
    opt = checkpoint.get("opt", {})
    opt = vars(opt) if isinstance(opt, argparse.Namespace) else opt
    if architecture is None and "config" in checkpoint:
        config, tokenizer = unpack_architecture(checkpoint)
    else:
        # as the reference reads checkpoints that do not name a model
        named = architecture or opt.get("retriever_model_id") or "bert-base-multilingual-cased"
        try:
            folder = find_model(named, allow_download)
        except ValueError as error:
            raise ValueError(f"{file} needs configuration and tokenizer of {named}: {error}") from error
        config, tokenizer = read_config(folder), read_tokenizer(folder)
    normalized = bool(opt.get("norm_query") and opt.get("norm_doc"))
    model = build_encoder(config, pooling or opt.get("pooling"))
    weights = BackboneWeights(*bare_weights(checkpoint["model"]), origin=str(file))
    return Retriever(model, tokenizer, str(file), normalized), weights


# --- Checkpoints that need no other file ------------------------------------------------------------------------------


def pack_architecture(retriever: Retriever) -> dict:
    """Configuration and tokenizer as plain values, to be kept inside a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        retriever.tokenizer.save_pretrained(folder)
        files = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
    tokenizer = {name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in files.items()}
    return {"config": json.loads(retriever.model.config.to_json_string()), "tokenizer": tokenizer}


def unpack_architecture(checkpoint: dict) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The opposite of :func:`pack_architecture`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(checkpoint["config"]))
        for name, content in checkpoint["tokenizer"].items():
            (Path(folder) / Path(name).name).write_bytes(content.numpy().tobytes())
        return read_config(Path(folder)), read_tokenizer(Path(folder))
