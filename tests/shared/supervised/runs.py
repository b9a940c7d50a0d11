"""What tests of supervised trainings do with a run: stop it, read its log and its newest checkpoint."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.run.checkpoint import load_latest
from shared.run.run import Run

# of the official script, which later recipes took over
DEIT_DEFAULTS = {
    "batch_size": 64, "drop": 0.0, "drop_path": 0.1, "model_ema": True, "model_ema_decay": 0.99996,
    "model_ema_force_cpu": False, "opt": "adamw", "opt_eps": 1e-8, "opt_betas": None, "clip_grad": None,
    "momentum": 0.9, "weight_decay": 0.05, "sched": "cosine", "lr": 5e-4, "lr_noise": None, "lr_noise_pct": 0.67,
    "lr_noise_std": 1.0, "warmup_lr": 1e-6, "min_lr": 1e-5, "decay_epochs": 30, "warmup_epochs": 5,
    "cooldown_epochs": 10, "patience_epochs": 10, "decay_rate": 0.1, "aa": "rand-m9-mstd0.5-inc1", "smoothing": 0.1,
    "train_interpolation": "bicubic", "repeated_aug": True, "reprob": 0.25, "remode": "pixel", "recount": 1,
    "resplit": False, "mixup": 0.8, "cutmix": 1.0, "cutmix_minmax": None, "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5, "mixup_mode": "batch", "teacher_model": "regnety_160", "teacher_path": "",
    "distillation_type": "none", "distillation_alpha": 0.5, "distillation_tau": 1.0, "data_set": "IMNET",
    "inat_category": "name", "seed": 0, "resume": "", "start_epoch": 0, "eval": False, "dist_eval": False,
    "pin_mem": True, "world_size": 1, "dist_url": "env://", "input_size": 224,
}  # fmt: skip


class Stop(Exception):
    pass


@contextlib.contextmanager
def stopped_after(updates: int) -> Iterator[None]:
    """In here a training ends like a killed one when it wants to make another update than so many."""
    update, calls = Run.update, []

    def stop(*args) -> None:
        calls.append(args)
        if len(calls) > updates:
            raise Stop
        update(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Run, "update", stop)
        yield


def lines(output_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir) -> list[float]:
    return [line["loss"] for line in lines(output_dir) if "loss" in line]


def state_of(output_dir) -> dict:
    return load_latest(Path(output_dir) / "checkpoint.pth")
