"""What the evaluation scripts have in common: flags, and a training on labelled images by epochs."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.linear import train_one_epoch, validate
from shared.images.loading import BadImages, EvalDataset, default_num_workers
from shared.images.sources import ImageSource
from shared.images.views import ViewRecipe
from shared.run.checkpoint import load_latest, save, without_prefix
from shared.run.flags import Parser, parse_with_embedded_defaults

from .hub import CARD, RUN_ON_DIGITS

CHECKPOINT = "checkpoint.pth.tar"

# --- Flags ------------------------------------------------------------------------------------------------------------

# Without --data_path: 8x8 pixel digits, and the network that main_swav.py trains on them.
EMBEDDED_DATA_DEFAULTS = {
    "arch": "test_resnet",
    "image_size": 32,
    "pretrained": RUN_ON_DIGITS,
}
AT_LEAST_ONE = ("epochs", "val_freq", "batch_size", "images_per_sheet", "max_sheets")


def evaluation_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser with the flags that choose the network.

    Args:
        docstring: Of the script; its first paragraph is the description.
    """
    parser = Parser(docstring)
    add = parser.add_argument_group("network").add_argument
    add("--arch", default="resnet50", help="resnet50, resnet50w2, resnet50w4, resnet50w5; torchvision's, timm's models")
    weights = "a file of any layout, a release (swav_200ep), or random; by default the architecture's released weights"
    add("--pretrained", default="", help=weights)
    add("--allow_partial", action="store_true", help="go on when the file does not fill the network")
    return parser


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Labelled images to learn from and to classify."""
    add = parser.add_argument_group("data").add_argument
    images = "a folder with train/ and val/ or one of class folders, .txt list or torchvision name; default: digits"
    add("--data_path", default=None, help=images)
    add("--val_path", default=None, help="images to classify; by default those that belong to --data_path")
    add("--allow_absolute_paths", action="store_true", help="in .txt lists")
    add("--image_size", type=int, default=224, help="side of the crops in pixels, 7/8 of the resized short side")


def add_training_flags(add: Callable[..., argparse.Action], epochs: int) -> None:
    """A training on labelled images; ``add`` is the ``add_argument`` of a group."""
    add("--num_labels", type=int, default=1000, help="outputs of the classifier")
    add("--on_bad_image", default="replace", choices=("replace", "error"), help="what an unreadable train image does")
    fraction = "stop when more train images than this share are unreadable"
    add("--max_bad_fraction", type=float, default=0.01, help=fraction)
    add("--crop_scale", type=float, nargs=2, default=(0.08, 1.0), help="area range of the train crops")
    add("--epochs", type=int, default=epochs)
    add("--batch_size", type=int, default=32, help="images per process")
    add("--seed", type=int, default=31)


def add_run_flags(parser: argparse.ArgumentParser, what_to_validate: str) -> Callable[..., argparse.Action]:
    """Where a training leaves its files, and whether there is one; returns the ``add_argument`` of the group."""
    add = parser.add_argument_group("run").add_argument
    folder = "for checkpoint.pth.tar and log.txt; not the folder of the training run"
    add("--dump_path", "--output_dir", default=".", help=folder)
    add("--evaluate", action="store_true", help=f"only validate {what_to_validate}")
    return add


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Device and loader flags, and those of the official launchers."""
    add = parser.add_argument_group("processes").add_argument
    workers = "loader processes per rank; None: cores per rank less one, at most 10"
    add("--workers", "--num_workers", type=int, default=None, help=workers)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dist_url", default="env://", help="rendezvous of the processes")
    add("--world_size", type=int, default=-1, help="ignored: read from the environment")
    add("--rank", type=int, default=0, help="ignored: read from the environment")
    add("--local_rank", "--local-rank", type=int, default=0, help="ignored: read from the environment")


def parse_and_check(parser: argparse.ArgumentParser, arguments: Sequence[str] | None, **defaults) -> argparse.Namespace:
    """Parse and check; without ``--data_path`` the defaults are ``defaults`` and those for the embedded digits."""
    args = parse_with_embedded_defaults(parser, arguments, EMBEDDED_DATA_DEFAULTS | defaults, {})
    for flag in AT_LEAST_ONE:
        if (value := getattr(args, flag, None)) is not None and value < 1:
            parser.error(f"--{flag} {value} is less than 1")
    if args.workers is None:
        args.workers = default_num_workers()
    return args


def labelled_sources(args: argparse.Namespace) -> tuple[ImageSource, ImageSource]:
    """Images to learn from and to classify; the classifier has an output for each of their classes."""
    paths = (args.data_path, args.val_path, args.allow_absolute_paths)
    sources = frozen.labelled_sources(*paths, num_labels=args.num_labels)
    for source in sources:
        distributed.print_once(source.describe())
    return sources


# --- Training on labels -----------------------------------------------------------------------------------------------


class LabelledTraining:
    """Learn from labelled images, and validate; writes ``checkpoint.pth.tar`` and ``log.txt`` (JSON lines).

    Goes on from the checkpoint in ``--dump_path``, ours or an official one, if there is one.

    Args:
        args: Flags of :func:`add_data_flags`, :func:`add_training_flags`, :func:`add_run_flags` and
            :func:`add_process_flags`.
        module: What learns, from what ``features`` gives.
        scheduler: Of the learning rates, by epochs.
        run_flags: Names of the flags that a run which is resumed must have as they were.
        pretrained: Checksum of the weights that the evaluation started from.
        rates: What the log calls the learning rate of each parameter group.
        best_of: Accuracies of the best epoch that the checkpoint names, as the official one does.

    Raises:
        ValueError: If the checkpoint is not one of this run.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        module: nn.Module,
        features: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler,
        run_flags: Sequence[str],
        pretrained: int,
        rates: tuple[str, ...] = ("train_lr",),
        best_of: tuple[str, ...] = ("acc1",),
    ):
        self.args, self.folder, self.rates, self.best_of = args, Path(args.dump_path), rates, best_of
        self.module, self.features, self.optimizer, self.scheduler = module, features, optimizer, scheduler
        self.flags, self.pretrained = {name: getattr(args, name) for name in run_flags}, pretrained
        self.first_epoch, self.log = 0, []
        checkpoint = load_latest(self.folder / CHECKPOINT)
        if checkpoint is not None:
            self._resume(checkpoint, self.folder / CHECKPOINT)

    def _resume(self, checkpoint: dict, path: Path) -> None:
        if not {"epoch", "state_dict", "optimizer", "scheduler"} <= checkpoint.keys():
            raise ValueError(f"{path} is a checkpoint of another script; choose another --dump_path")
        if checkpoint.get("pretrained", self.pretrained) != self.pretrained:
            raise ValueError(f"{path} started from other weights than those of --pretrained; use another --dump_path")
        for flag, value in checkpoint.get("flags", {}).items():
            if flag in self.flags and self.flags[flag] != value:
                raise ValueError(
                    f"--{flag} {self.flags[flag]} does not fit {path}, which was written with --{flag} {value}; use "
                    "that or another --dump_path"
                )
        set_weights(self.module, checkpoint["state_dict"], path)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        self.first_epoch, self.log = checkpoint["epoch"], checkpoint.get("log", [])
        distributed.print_once(f"resuming at epoch {self.first_epoch}")

    def run(
        self, train: ImageSource, val: EvalDataset, device: torch.device, val_freq: int = 1, drop_single: bool = False
    ) -> dict[str, float]:
        """The epochs that are still to be done; loss and accuracies in percent after the last one.

        Args:
            val_freq: Validate every so many epochs, and after the last one.
            drop_single: See :func:`shared.evaluation.frozen.train_crops`.
        """
        args, wrapped, result = self.args, distributed.wrap(self.module, device), None
        if distributed.is_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        recipe = ViewRecipe(args.image_size, tuple(args.crop_scale), interpolation="bilinear")
        bad_images = BadImages(len(train), self.folder / "bad_images.txt", args.on_bad_image, args.max_bad_fraction)
        in_chans = val.transform.in_chans
        loader, sampler = frozen.train_crops(
            train, recipe, args.batch_size, args.seed, in_chans, bad_images, args.workers, device, drop_single
        )
        for epoch in range(self.first_epoch, args.epochs):
            sampler.set_epoch(epoch)
            rates = [group["lr"] for group in self.optimizer.param_groups]
            line = {"epoch": epoch, **dict(zip(self.rates, rates, strict=True))}
            batches = frozen.on_device(CARD, loader, device)
            line["train_loss"] = train_one_epoch(wrapped, self.features, batches, self.optimizer)
            line["bad_images"] = bad_images.count()
            due = (epoch + 1) % val_freq == 0 or epoch + 1 == args.epochs
            result = self.validate(val, device) if due else None
            self._end_epoch(line, result)
        result = result or self.validate(val, device)  # there was nothing left to train
        distributed.print_once(
            f"Top-1 accuracy after the last epoch: {result['acc1']:.2f} % (top-5 {result['acc5']:.2f} %, "
            f"best top-1 of all epochs {self.best()[0]:.2f} %)"
        )
        return result

    def validate(self, val: EvalDataset, device: torch.device) -> dict[str, float]:
        return validate(self.module, self.features, val, device, self.args.batch_size, self.args.workers)

    def best(self) -> tuple[float, ...]:
        """Accuracies of the best epoch so far."""
        names = [f"test_{name}" for name in self.best_of]
        validated = [tuple(line[name] for name in names) for line in self.log if names[0] in line]
        return max(validated, default=(0.0,) * len(names))

    def _end_epoch(self, line: dict[str, float], result: dict[str, float] | None) -> None:
        self.log.append(line)
        if result is not None:
            line |= {f"test_{name}": value for name, value in result.items()}
            line["best_acc1"] = self.best()[0]
        self.scheduler.step()
        distributed.print_once("  ".join(f"{name} {value:.5g}" for name, value in line.items()))
        if not distributed.is_main_process():
            return
        state = {
            "epoch": line["epoch"] + 1,
            "state_dict": {f"module.{name}": value for name, value in self.module.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "best_acc": self.best() if len(self.best_of) > 1 else self.best()[0],
            "flags": self.flags,
            "pretrained": self.pretrained,
            "log": self.log,
        }
        save(self.folder / CHECKPOINT, state)
        (self.folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in self.log))


def set_weights(module: nn.Module, state_dict: dict[str, Tensor], file: str | Path) -> None:
    """Load weights that were saved with the prefix ``module.``.

    Raises:
        ValueError: If names or shapes are not exactly those of ``module``.
    """
    try:
        module.load_state_dict(without_prefix(state_dict, "module."))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:1000]
        advice = "check --arch, --num_labels and the flags of the classifier"
        raise ValueError(f"{file} does not fit: {reason}; {advice}") from error
