"""The smallest encoder, texts and training, for this folder and for the reliability, GPU and SLURM suites."""

import json
from pathlib import Path

import torch
from transformers import BertConfig

from contriever import preprocess, train
from contriever.encoder import Retriever, build_encoder, read_tokenizer
from tests.run_folders import lines
from tests.tiny_training import Training

WORDS = (
    "the a wing flow heat body shock wave layer of in and is thin plate cone jet mach . ! ? , speed pressure".split()
)
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"w{i}" for i in range(40))]
FLAGS = (
    "--per_gpu_batch_size 4 --queue_size 8 --total_steps 12 --warmup_steps 2 --lr 0.01 --temperature 0.5 "
    "--chunk_length 32 --augmentation delete --prob_augmentation 0.1 --momentum 0.9 --num_workers 0 --device cpu "
    "--amp fp32 --log_freq 1 --eval_freq 4 --eval_documents 8 --saveckp_steps 1 --save_freq 4"
).split()
TRAININGS = {
    "contriever": Training(
        "contriever.train",
        tuple(FLAGS),
        data=("--train_data", "{tokens}", "--retriever_model_id", "{encoder}"),
        pair=("--per_gpu_batch_size", "2"),
        exact=("--dropout", "0"),
        launcher=("contriever.run_with_submitit", "main"),
        job=("--total_steps", "120", "--save_freq", "0", "--eval_freq", "0"),
    )
}
TINY = [*FLAGS, "--total_steps", "6"]


# --- Encoder and text -------------------------------------------------------------------------------------------------


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


def write_jsonl(path: Path, *records: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --- Trainings through the real script --------------------------------------------------------------------------------


def make_data(folder: Path) -> Path:
    """``encoder`` and ``tokens`` (three shards) in ``folder``."""
    tiny_retriever(folder / "encoder").save(folder / "encoder")
    text = write_texts(folder / "text.txt")
    make_shards(text, folder / "tokens", folder / "encoder", "--shard_mb", "0.004")
    return folder


def make_shards(text: Path, outdir: Path, encoder: Path, *flags: str) -> None:
    arguments = ["--datapath", str(text), "--outdir", str(outdir), "--tokenizer", str(encoder), "--num_workers", "1"]
    preprocess.preprocess(preprocess.get_args_parser().parse_args([*arguments, *flags]))


def run_train(data: Path, output_dir: Path, *flags) -> list[dict]:
    """Lines of the log of a training."""
    places = ["--train_data", data / "tokens", "--retriever_model_id", data / "encoder", "--output_dir", output_dir]
    train.train_contriever(train.parse_args([*TINY, *map(str, places), *map(str, flags)]))
    return lines(output_dir)


def train_on_rank(rank: int, data: Path, output_dir: Path, *flags) -> None:
    run_train(data, output_dir, *flags)
