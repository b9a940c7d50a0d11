"""Tokenised text on the disk, as ``preprocess.py`` writes it, and the chunks that training takes from it.

A data set is a folder of shards, each one of three files::

    <name>.tokens.npy     token ids of all documents, one after the other: (N,) uint16, or int32 for large vocabularies
    <name>.borders.npy    where documents begin, and N at the end: (documents + 1,) int64
    <name>.json           what made them; written last, so that a shard with this file is complete

The arrays are memory-mapped: a data set may be larger than the memory, and all processes of a host share it. Folders of
the reference's files (``*.pkl``: one tensor of ids per file, without borders) are read as well.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from shared.networks.weights import safe_load

from .files import read_documents, read_json, replacing, write_json
from .normalize import clean

DOCUMENTS_AT_ONCE = 1000
MIN_TOKENS = 8  # shorter documents make no pair of views


@dataclass(frozen=True)
class Shard:
    """Tokens (N,) and, where known, borders (documents + 1,)."""

    path: Path
    tokens: np.ndarray
    borders: np.ndarray | None


def write_shard(path: Path, tokens: np.ndarray, borders: np.ndarray, facts: dict) -> None:
    """Write a shard; its json file appears once everything else is on the disk.

    Args:
        path: ``<folder>/<name>``, without an ending.
        facts: For the json file: what made it.
    """
    for kind, array in (("tokens", tokens), ("borders", borders)):
        with replacing(path.with_name(f"{path.name}.{kind}.npy"), "wb") as file:
            np.save(file, array)
    write_json(path.with_name(f"{path.name}.json"), {**facts, "tokens": len(tokens), "documents": len(borders) - 1})


@dataclass(frozen=True)
class Job:
    """One shard to be made: the lines of a file that begin between two bytes, and how to read them.

    Attributes:
        facts: What the shard's json file keeps; where the file lies does not matter.
    """

    source: Path
    shard: Path
    facts: dict

    @classmethod
    def of(cls, source: Path, shard: Path, start: int = 0, end: int | None = None, **facts: str | bool) -> "Job":
        """The lines from byte ``start`` to before ``end`` (by default, of the whole file).

        Args:
            facts: Names of the ``tokenizer`` and hash of its ``vocabulary``; ``normalize_text``, ``on_bad_bytes``.
        """
        status = source.stat()
        place = {"source": source.name, "start": start, "end": status.st_size if end is None else end}
        state = {"shard": shard.name, "source_bytes": status.st_size, "source_mtime_ns": status.st_mtime_ns}
        return cls(source, shard, place | state | {"normalize_text": False, "on_bad_bytes": "error"} | facts)


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary, to recognise text that was tokenised with another one."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def tokenize_lines(job: Job, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of all documents (N,), without special tokens and uncut, and their borders (documents + 1,)."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    facts = job.facts
    texts = read_documents(str(job.source), facts["start"], facts["end"], facts["on_bad_bytes"])
    parts, lengths = [np.zeros(0, dtype)], [0]
    while documents := list(itertools.islice(texts, DOCUMENTS_AT_ONCE)):
        ids = tokenizer(clean(documents, False, facts["normalize_text"]), verbose=False, **options)["input_ids"]
        parts.append(np.fromiter(itertools.chain.from_iterable(ids), dtype))
        lengths.extend(map(len, ids))
    return np.concatenate(parts), np.cumsum(lengths, dtype=np.int64)


def read_facts(tokens: Path) -> dict:
    """What the json file beside a file of tokens says; nothing if the shard is not complete, or the reference's."""
    return read_json(tokens.with_name(tokens.name.removesuffix(".tokens.npy") + ".json"), {})


def token_files(folder: str | Path) -> list[Path]:
    """The files with tokens of a data set, in order."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--train_data {folder} is no folder; preprocess.py makes one from a text file")
    ours, official = sorted(folder.glob("*.tokens.npy")), sorted(folder.glob("*.p*"))
    if ours and official:
        raise ValueError(
            f"--train_data {folder} holds {ours[0].name} and {official[0].name}: two layouts in one folder"
        )
    if not ours and not official:
        raise ValueError(f"--train_data {folder} holds no tokenised text: neither *.tokens.npy nor *.pkl")
    return ours or official


def open_shard(file: Path) -> Shard:
    """Map a shard of ours into memory, or read one file of the reference."""
    if file.suffix != ".npy":
        tokens = safe_load(file)
        if not isinstance(tokens, torch.Tensor) or tokens.dim() != 1 or tokens.is_floating_point():
            raise ValueError(f"{file} holds no one-dimensional tensor of token ids")
        return Shard(file, tokens.numpy(), None)
    facts = read_facts(file)
    if not facts:
        raise ValueError(f"{file} belongs to an unfinished shard; run preprocess.py again, it goes on where it stopped")
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
        of_borders = file.with_name(file.name.removesuffix("tokens.npy") + "borders.npy")
        borders = np.load(of_borders, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if len(tokens) != facts["tokens"] or len(borders) != facts["documents"] + 1 or borders[-1] != len(tokens):
        raise ValueError(
            f"{file} is damaged: {len(tokens)} tokens and {len(borders) - 1} documents that end at token "
            f"{borders[-1]}, but its json file says {facts['tokens']} and {facts['documents']}"
        )
    return Shard(file, tokens, borders)


def files_of_rank(files: list[Path], loading_mode: str, rank: int, world_size: int) -> list[Path]:
    """The files that one process trains on.

    Args:
        loading_mode: ``split``: contiguous, nearly equal runs, the first ranks get one more; ``full``: all of them;
            ``single``: the first one.
    """
    if loading_mode == "split":
        return [files[i] for i in np.array_split(np.arange(len(files)), world_size)[rank]]
    return files if loading_mode == "full" else files[:1]


def check_tokenizer(files: list[Path], fingerprint: str) -> None:
    """Raise ``ValueError`` if a shard was made with another vocabulary; the reference's files do not say."""
    for file in files:
        facts = read_facts(file) if file.suffix == ".npy" else {}
        if facts and facts["vocabulary"] != fingerprint:
            raise ValueError(
                f"{file} was tokenised with {facts['tokenizer']}, whose vocabulary is not that of --retriever_model_id"
            )


class ChunkedText:
    """A data set cut into chunks: what a pair of views is taken from.

    Args:
        shards: In order.
        chunk_length: Tokens per chunk.
        within_documents: False: all documents make one sequence that is cut every ``chunk_length`` tokens, as in the
            reference, so that a chunk may hold the end of one document and the beginning of the next. True: a document
            longer than a chunk is cut into equal parts, and no chunk holds more than one document.
    """

    def __init__(self, shards: list[Shard], chunk_length: int, within_documents: bool = False):
        self.shards, self.chunk_length, self.within_documents = shards, chunk_length, within_documents
        self.starts = np.cumsum([0, *(len(shard.tokens) for shard in shards)])
        self.num_tokens = int(self.starts[-1])
        name = shards[0].path.parent
        if within_documents:
            self.borders = document_borders(shards)
            lengths = np.diff(self.borders)
            parts = np.where(lengths >= MIN_TOKENS, -(-lengths // chunk_length), 0)
            self.first_parts = np.concatenate([[0], np.cumsum(parts)])
            if not self.first_parts[-1]:
                raise ValueError(f"--train_data {name} has no document of {MIN_TOKENS} tokens or more")
        elif self.num_tokens < 2 * chunk_length:
            raise ValueError(
                f"--train_data {name} has {self.num_tokens} tokens, fewer than two chunks of --chunk_length "
                f"{chunk_length}"
            )

    def __len__(self) -> int:
        """Chunks when the first one begins with the first token."""
        return self.num_chunks(0)

    def draw_offset(self, rng) -> int:
        """Where the first chunk of an epoch begins, so that chunks are not the same in every epoch."""
        return rng.randint(0, self.chunk_length - 1)

    def num_chunks(self, offset: int) -> int:
        if self.within_documents:
            return int(self.first_parts[-1])
        return (self.num_tokens - offset) // self.chunk_length

    def chunk(self, index: int, offset: int = 0) -> np.ndarray:
        """Token ids of one chunk, int64 (chunk_length,), or fewer within documents."""
        if not self.within_documents:
            start = offset + index * self.chunk_length
            return self.read(start, start + self.chunk_length)
        document = int(np.searchsorted(self.first_parts, index, side="right")) - 1
        part, parts = index - self.first_parts[document], np.diff(self.first_parts[document : document + 2])[0]
        start, length = self.borders[document], self.borders[document + 1] - self.borders[document]
        return self.read(int(start + length * part // parts), int(start + length * (part + 1) // parts))

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens ``start`` to ``end`` of the whole sequence, across the borders of shards."""
        pieces = []
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < end:
            stop = min(end, int(self.starts[shard + 1]))
            pieces.append(self.shards[shard].tokens[start - self.starts[shard] : stop - self.starts[shard]])
            start, shard = stop, shard + 1
        return np.concatenate(pieces).astype(np.int64)

    def documents(self) -> Iterator[np.ndarray]:
        """Token ids of one document after the other, int64; empty ones are left out."""
        for start, end in itertools.pairwise(document_borders(self.shards).tolist()):
            if end > start:
                yield self.read(start, end)


def document_borders(shards: list[Shard]) -> np.ndarray:
    """Where each document of all shards begins, and their end: (documents + 1,) int64."""
    start, parts = 0, [np.zeros(1, dtype=np.int64)]
    for shard in shards:
        if shard.borders is None:
            raise ValueError(
                f"{shard.path} does not say where its documents begin: use --chunks packed, or make shards that do "
                "with preprocess.py"
            )
        parts.append(shard.borders[1:] + start)
        start += len(shard.tokens)
    return np.concatenate(parts)
