"""Tiny supervised trainings through the real script, on generated images."""

import json
from functools import partial
from pathlib import Path

import torch

from resmlp import main
from resmlp.resmlp_models import ARCHITECTURES, ResMLP
from shared import distributed
from shared.checkpoint import load_latest

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--model resmlp_12 --input-size 16 --patch-size 4 --batch-size 8 --epochs 1 --warmup-epochs 0 --num_workers 0 "
    "--log_freq 1 --no-repeated-aug --pictures off --device cpu"
).split()


def shrink_networks() -> None:
    """Give ResMLP-S12 two blocks of 16 channels."""
    ARCHITECTURES["resmlp_12"] = partial(ResMLP, embed_dim=16, depth=2, init_scale=0.1)


def train(output_dir, *flags) -> list[dict]:
    """Lines of the log of a training."""
    main.train_resmlp(main.parse_args([*TINY, "--output_dir", str(output_dir), *map(str, flags)]))
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
