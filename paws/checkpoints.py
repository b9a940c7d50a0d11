"""Checkpoints of the training programs, under the names and with the first keys of the official ones."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from shared.run.checkpoint import CheckpointError, load_latest

NETWORK_FLAGS = ("model_name", "in_chans", "output_dim", "use_pred_head")


# --- Pre-training -----------------------------------------------------------------------------------------------------


def latest(args: argparse.Namespace) -> str:
    """Name of the checkpoint that a run goes on from."""
    return f"{args.write_tag}-latest.pth.tar"


def numbered_checkpoint(args: argparse.Namespace, epoch: int) -> str | None:
    """Name under which the checkpoint of this epoch (from 0) stays; None for most epochs."""
    done = epoch + 1
    due = args.checkpoint_freq > 0 and done % args.checkpoint_freq == 0
    return f"{args.write_tag}-ep{done}.pth.tar" if due else None


def find_checkpoint(path: Path, read_checkpoint: str | None) -> dict | None:
    """The run's newest checkpoint; while it has none, that of ``--read_checkpoint``."""
    checkpoint = load_latest(path)
    if checkpoint is None and read_checkpoint is not None:
        checkpoint = load_latest(path.parent / read_checkpoint)
        if checkpoint is None:
            raise CheckpointError(f"--read_checkpoint {read_checkpoint}: there is no such file in {path.parent}")
    return checkpoint


def to_official(state: dict) -> dict:
    """The state of a run with the keys of the official checkpoints.

    The position in the supports needs no state of its own: what a step gets is a function of its number.
    """
    amp, args = state.pop("fp16_scaler"), state["args"]
    return state | {
        "unlabel_prob": args["unlabeled_frac"],
        "s_batch_size": args["supervised_imgs_per_class"],
        "u_batch_size": args["unsupervised_batch_size"],
        "lr": args["lr"],
        "temperature": args["temperature"],
        "amp": amp,
    }


def from_official(checkpoint: dict) -> dict:
    return checkpoint | {"fp16_scaler": checkpoint.get("amp")}


# --- Fine-tuning ------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """What the checkpoints of a fine-tuning hold beside network and optimiser.

    Attributes:
        pretrained: Checksum of the weights that the run started from.
        best: Best top-1 of all evaluations, in percent.
    """

    pretrained: int
    best: float = 0.0

    def state_dict(self) -> dict:
        return {"pretrained": self.pretrained, "best_top1_acc": self.best}

    def load_state_dict(self, state: dict) -> None:
        """Go on; the checkpoint of a run that started from other weights is refused with a ``ValueError``."""
        if state["pretrained"] != self.pretrained:
            raise ValueError("it started from other weights than those of --pretrained; use another --output_dir")
        self.best = state["best_top1_acc"]


def fine_tuning_to_official(state: dict) -> dict:
    """The state of a run, :class:`Progress` as its ``progress``, with the keys of the official checkpoints."""
    amp, progress, args = state.pop("fp16_scaler"), state.pop("progress"), state["args"]
    return state | progress | {"unlabel_prob": args["unlabeled_frac"], "lr": args["lr"], "amp": amp}


def fine_tuning_from_official(checkpoint: dict) -> dict:
    progress = {key: checkpoint.get(key) for key in ("pretrained", "best_top1_acc")}
    return checkpoint | {"progress": progress, "fp16_scaler": checkpoint.get("amp")}
