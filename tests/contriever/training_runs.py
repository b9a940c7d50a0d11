"""Tiny trainings through the real script."""

import json
from pathlib import Path

import torch

from contriever import preprocess, train
from shared import distributed
from shared.run.checkpoint import load_latest
from tests.contriever.tiny_encoder import tiny_retriever, write_texts

TINY = (
    "--per_gpu_batch_size 4 --queue_size 8 --total_steps 6 --warmup_steps 2 --lr 0.01 --temperature 0.5 "
    "--chunk_length 32 --augmentation delete --prob_augmentation 0.1 --momentum 0.9 --num_workers 0 --device cpu "
    "--amp fp32 --log_freq 1 --eval_freq 4 --eval_documents 8 --saveckp_steps 1 --save_freq 4"
).split()


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
    """One of several processes of ``run_processes``, which have joined already."""
    distributed.init = lambda *_: torch.device("cpu")
    run_train(data, output_dir, *flags)


def lines(output_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir) -> list[float]:
    return [line["loss"] for line in lines(output_dir) if "loss" in line]


def state_of(output_dir) -> dict:
    return load_latest(Path(output_dir) / "checkpoint.pth")
