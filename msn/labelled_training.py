"""What linear evaluation and fine-tuning have in common: batches, validation, and the layout of their checkpoints."""

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from shared import distributed
from shared.images.loading import BadImages, EpochBatchSampler, EvalDataset, make_loader
from shared.images.training_data import TrainingData
from shared.optimisation.precision import Precision
from shared.run.run import Run
from shared.supervised.evaluation import evaluate_classifier


def training_batches(
    args: argparse.Namespace,
    dataset: Dataset,
    bad_images: BadImages,
    checksum: int,
    device: torch.device,
    drop_last: bool = True,
) -> TrainingData:
    """The train images of this process, in an order of their own in every epoch.

    Args:
        args: Flags ``batch_size``, ``num_workers`` and ``seed``.
        dataset: Of items (views, label, index) for keys (epoch, index).
        bad_images: Policy of the data set.
        checksum: Of the images.
        drop_last: Leave out the last, smaller batch.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    sampler = EpochBatchSampler(len(dataset), args.batch_size, args.seed, rank, world_size, drop_last)
    loader = make_loader(dataset, batch_sampler=sampler, num_workers=args.num_workers, device=device)
    return TrainingData(dataset, sampler, loader, bad_images, checksum, args.batch_size * world_size, args.num_workers)


class Validation:
    """Accuracy on the images to classify, each counted once.

    Args:
        network: Images to logits, in float32.
        batch_size: Images per process in one pass.

    Attributes:
        best: Best top-1 of all validations, in percent; part of the checkpoint.
        result: Of the last one: ``loss``, and ``acc1`` and ``acc5`` in percent.
    """

    def __init__(
        self, network: nn.Module, dataset: EvalDataset, device: torch.device, batch_size: int, num_workers: int
    ):
        self.network, self.dataset, self.precision = network, dataset, Precision("fp32", device)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.best, self.result = 0.0, None

    def state_dict(self) -> dict:
        return {"best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.best = state["best"]

    def run(self, between_batches=None) -> dict[str, float]:
        """The result; ``between_batches`` is called equally often on every process and may raise to stop."""
        self.result = evaluate_classifier(
            self.network, self.dataset, self.precision, self.batch_size, self.num_workers, between_batches
        )
        self.best = max(self.best, self.result["acc1"])
        return self.result

    def end_epoch(self, run: Run, bad_images: BadImages, is_due: bool = True) -> None:
        """Validate if that is due, log the epoch, and save."""
        line = {"bad_images": bad_images.count()}
        if is_due:
            found = {f"test_{name}": value for name, value in self.run(run.stop_if_asked).items()}
            found["best_acc1"] = self.best
            run.log_evaluation(**found)
            line |= found
        run.log_epoch(**line)
        run.end_epoch()

    def end(self) -> dict[str, float]:
        """Print and return the result after the last epoch."""
        result = self.result or self.run()  # resumed after the last epoch
        distributed.print_once(
            f"Top-1 accuracy after the last epoch: {result['acc1']:.2f} % (top-5 {result['acc5']:.2f} %, best top-1 of "
            f"all epochs {self.best:.2f} %)"
        )
        return result


def to_official(state: dict, pretrained: int, **frozen: nn.Module) -> dict:
    """The state of a run under the names of the official checkpoints of a linear evaluation.

    Args:
        pretrained: Checksum of the weights of the encoder at the start.
        frozen: Networks that do not learn, for others to use.
    """
    return {
        **state,
        **{name: network.state_dict() for name, network in frozen.items()},
        "best_top1_acc": state["best_top1_acc"]["best"],
        "batch_size": state["batch_size"] // state["world_size"],  # of one process
        "lr": state["args"]["lr"],
        "pretrained": pretrained,
    }


def from_official(checkpoint: dict, pretrained: int, path: Path) -> dict:
    """The way back; files of the official code have neither flags nor a log.

    Args:
        path: Of the checkpoint, for messages.

    Raises:
        ValueError: If it is not one of this run.
    """
    if "best_top1_acc" not in checkpoint:
        raise ValueError(f"{path} is a checkpoint of another script; choose another --output_dir")
    if checkpoint.get("pretrained", pretrained) != pretrained:
        raise ValueError(f"{path} started from the features of other weights; use another --output_dir")
    state = {
        **checkpoint,
        "best_top1_acc": {"best": checkpoint["best_top1_acc"]},
        "batch_size": checkpoint["batch_size"] * checkpoint["world_size"],
    }
    if isinstance(log := checkpoint.get("log"), list):  # an earlier layout: the lines of the log, and a few flags
        length = len("".join(json.dumps(line) + "\n" for line in log))
        state |= {"log": {"lengths": {"log.txt": length}, "sums": []}, "args": checkpoint["flags"]}
    return state
