"""Encoders and texts of a few kilobytes."""

import json
from pathlib import Path

import torch
from transformers import BertConfig

from contriever.encoder import Retriever, build_encoder, read_tokenizer

WORDS = (
    "the a wing flow heat body shock wave layer of in and is thin plate cone jet mach . ! ? , speed pressure".split()
)
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"w{i}" for i in range(40))]


def write_tokenizer(folder: Path, vocabulary: list[str]) -> Path:
    """A WordPiece tokenizer, as old folders hold it: a list of words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return folder


def tiny_retriever(
    folder: Path, vocabulary: list[str] | None = None, config: dict | None = None, seed: int = 0
) -> Retriever:
    """A BERT with random weights; its tokenizer's files go to ``folder``."""
    vocabulary = vocabulary or VOCABULARY
    config = config or {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "vocab_size": len(vocabulary),
    }
    write_tokenizer(folder, vocabulary)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **config}))
    torch.manual_seed(seed)
    return Retriever(build_encoder(BertConfig(**config)).eval(), read_tokenizer(folder), "tiny")


def write_texts(path: Path, documents: int = 40, sentences: int = 6) -> Path:
    """One document per line; each has a word of its own, so that documents can be told apart."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for document in range(documents):
        picks = torch.randint(len(WORDS) - 6, (sentences, 6), generator=generator)
        lines.append(" ".join(" ".join([f"w{document % 40}", *(WORDS[i] for i in row), "."]) for row in picks.tolist()))
    path.write_text("\n".join(lines) + "\n")
    return path
