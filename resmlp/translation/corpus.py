"""Parallel text as batches: files, a joint subword vocabulary, batches of about equal numbers of tokens."""

import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor

from .sequence_models import BOS, EOS, PAD, UNK


def read_parallel_text(source_file: str, target_file: str) -> tuple[list[str], list[str]]:
    """Sentences of two UTF-8 files; line i of one translates line i of the other.

    Raises:
        ValueError: If a file is missing, is no UTF-8 or holds nothing, or their numbers of lines differ.
    """
    source, target = (read_lines(file) for file in (source_file, target_file))
    if len(source) != len(target):
        raise ValueError(f"{source_file} has {len(source)} lines, {target_file} has {len(target)}: not parallel")
    return source, target


def read_lines(file: str) -> list[str]:
    """Lines of a UTF-8 file."""
    if not Path(file).is_file():
        raise ValueError(f"{file} is not a file")
    lines = split_lines(Path(file).read_bytes(), file)
    if not any(line.strip() for line in lines):
        raise ValueError(f"{file} holds no sentence")
    return lines


def split_lines(text: bytes, origin: str) -> list[str]:
    """Lines of UTF-8, with or without a byte order mark, that end in ``\\n`` or ``\\r\\n``."""
    try:
        # not splitlines(): it also splits at characters that sentences may hold, such as U+2028 or a lone \r
        lines = text.decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{origin} is no UTF-8 text: {error}") from error
    return [line.removesuffix("\r") for line in lines]


def train_vocabulary(sentences: Sequence[str], size: int) -> bytes:
    """A SentencePiece model of byte-pair encoding that is learned on both languages together.

    Raises:
        ValueError: If the sentences do not yield ``size`` subwords, or need more.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            character_coverage=1.0,
            pad_id=PAD,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            num_threads=1,  # the same model on every machine
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or str(error)
        raise ValueError(f"--vocabulary_size {size}: {reason}") from error
    return model.getvalue()


def open_vocabulary(model: bytes, origin: str = "the vocabulary") -> SentencePieceProcessor:
    """Raises ``ValueError`` unless the ids of padding, unknown, begin and end are those of :func:`train_vocabulary`."""
    try:
        vocabulary = SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"{origin} is no SentencePiece model") from error
    ids = [vocabulary.pad_id(), vocabulary.unk_id(), vocabulary.bos_id(), vocabulary.eos_id()]
    if ids != [PAD, UNK, BOS, EOS]:
        raise ValueError(
            f"{origin} has the ids {ids} for padding, unknown, begin and end, expected {[PAD, UNK, BOS, EOS]}"
        )
    return vocabulary


class EncodedPairs:
    """Pairs of sentences as ids, in two flat arrays: millions of sentences without an object for each.

    Args:
        max_length: Pairs with a sentence of more tokens, its end included, are left out, and so are empty ones.
        part: Of the data, for the error.

    Attributes:
        left_out: How many.
        unknown: Share of the tokens that stand for text without a subword.

    Raises:
        ValueError: If no pair remains.
    """

    def __init__(
        self,
        vocabulary: SentencePieceProcessor,
        source: list[str],
        target: list[str],
        max_length: int,
        part: str = "train",
    ):
        ids = [vocabulary.encode(sentences) for sentences in (source, target)]
        kept = [(s, t) for s, t in zip(*ids, strict=True) if s and t and max(len(s), len(t)) < max_length]
        self.left_out = len(source) - len(kept)
        if not kept:
            raise ValueError(
                f"{part}: no pair of sentences, both with text, of at most {max_length - 1} subwords "
                f"(--max_length {max_length})"
            )
        self.ids, self.ends = [], []
        for side in zip(*kept, strict=True):
            self.ends.append(np.cumsum([len(sentence) for sentence in side]))
            self.ids.append(np.fromiter((i for sentence in side for i in sentence), np.int32, self.ends[-1][-1]))
        self.unknown = float(np.mean(np.concatenate(self.ids) == UNK))
        self.lengths = 1 + np.maximum(*(np.diff(ends, prepend=0) for ends in self.ends))  # with EOS or BOS

    def __len__(self) -> int:
        return len(self.lengths)

    def describe(self) -> str:
        unknown = f"; {100 * self.unknown:.2g} % of the subwords are unknown" if self.unknown else ""
        left_out = f"{self.left_out} left out: empty, or longer than --max_length"
        return f"{len(self):,} pairs of sentences, {left_out}{unknown}"

    def checksum(self) -> int:
        checksum = 0
        for array in (*self.ids, *self.ends):
            checksum = zlib.crc32(array, checksum)
        return checksum

    def sentence(self, side: int, index: int) -> list[int]:
        """Ids of a source (side 0) or target (side 1) sentence."""
        ends = self.ends[side]
        return self.ids[side][ends[index - 1] if index else 0 : ends[index]].tolist()

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Source ending in EOS (B, M), target beginning with BOS and target ending in EOS (both B, N), padded."""
        sources = [self.sentence(0, i) for i in indices]
        targets = [self.sentence(1, i) for i in indices]
        return (
            pad([[*s, EOS] for s in sources]),
            pad([[BOS, *t] for t in targets]),
            pad([[*t, EOS] for t in targets]),
        )


def pad(sentences: Sequence[list[int]]) -> Tensor:
    """Ids (B, N), int64, with PAD behind the shorter sentences."""
    length = max(map(len, sentences))
    return torch.tensor([s + [PAD] * (length - len(s)) for s in sentences])


class TokenBatchSampler:
    """Batches of sentences of similar length, the same on every run, resumable inside an epoch.

    The sentences are ordered by length, those of equal length at random, and cut into batches of at most ``max_tokens``
    including padding; the batches are shuffled and dealt out to the processes. All draws depend on (seed, epoch).

    Args:
        lengths: Longer sentence of each pair.
        max_tokens: Per process and batch, counted on the longer side.
    """

    def __init__(self, lengths: np.ndarray, max_tokens: int, seed: int = 0, rank: int = 0, world_size: int = 1):
        if lengths.max() > max_tokens:
            raise ValueError(f"--max_tokens {max_tokens} is less than a sentence of {lengths.max()} tokens")
        self.lengths, self.seed, self.rank, self.world_size = lengths, seed, rank, world_size
        self.epoch = self.start_step = 0
        self.cuts = self._cut(np.sort(lengths), max_tokens)  # the same in every epoch

    @staticmethod
    def _cut(lengths: np.ndarray, max_tokens: int) -> list[slice]:
        """Batches as ranges of the sentences in the order of their lengths."""
        cuts, start = [], 0
        for end in range(1, len(lengths) + 1):
            if end == len(lengths) or lengths[end] * (end + 1 - start) > max_tokens:
                cuts.append(slice(start, end))
                start = end
        return cuts

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return -(-len(self.cuts) // self.world_size)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch, self.start_step = epoch, start_step

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.Generator(np.random.PCG64([self.seed, self.epoch]))
        by_length = np.lexsort((generator.permutation(len(self.lengths)), self.lengths))
        order = np.resize(generator.permutation(len(self.cuts)), len(self) * self.world_size)
        for cut in order[self.rank :: self.world_size][self.start_step :]:
            yield by_length[self.cuts[cut]].tolist()
