"""Tiny supervised trainings through the real script, on generated images."""

import json
from pathlib import Path

import torch

from shared import distributed
from shared.run.checkpoint import load_latest
from xcit import main
from xcit.cross_covariance_transformer import SIZES

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--model xcit_nano_12_p8 --input-size 16 --batch-size 8 --epochs 1 --warmup-epochs 0 --num_workers 0 --log_freq 1 "
    "--no-repeated-aug --pictures off --device cpu"
).split()


def shrink_networks() -> None:
    """Give the nano networks two blocks of 32 channels."""
    SIZES["nano_12"] = dict(embed_dim=32, depth=2, num_heads=2, eta=1.0, tokens_norm=False)


def train(output_dir, *flags) -> list[dict]:
    """Lines of the log of a training."""
    main.train_xcit(main.parse_args([*TINY, "--output_dir", str(output_dir), *map(str, flags)]))
    return lines(output_dir)


def train_on_rank(rank: int, *flags) -> None:
    """One of several processes of ``run_processes``, which have joined already."""
    distributed.init = lambda *_: torch.device("cpu")
    shrink_networks()
    train(*flags)


def lines(output_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir) -> list[float]:
    return [line["loss"] for line in lines(output_dir) if "loss" in line]


def state_of(output_dir) -> dict:
    return load_latest(Path(output_dir) / "checkpoint.pth")
