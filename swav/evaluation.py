"""What the evaluation scripts have in common: flags, labelled images, and resuming after an epoch."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from shared import distributed
from shared.images.labelled import open_labelled
from shared.images.loading import BadImages, EpochBatchSampler, EvalTransform, default_num_workers, make_loader
from shared.images.sources import ImageSource
from shared.images.views import ViewRecipe
from shared.multicrop import MultiCropDataset, normalize_views
from shared.networks.backbones import input_channels
from shared.run.checkpoint import load_latest, save, without_prefix

from .hub import MEAN, RUN_ON_DIGITS, STD

# --- Flags ------------------------------------------------------------------------------------------------------------

# Without --data_path: 8x8 pixel digits, and the network that main_swav.py trains on them.
EMBEDDED_DATA_DEFAULTS = {
    "arch": "test_resnet",
    "image_size": 32,
    "pretrained": RUN_ON_DIGITS,
}


def evaluation_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser with the flags that choose the network.

    Args:
        docstring: Of the script; its first paragraph is the description.
    """
    parser = argparse.ArgumentParser(
        description=docstring.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("network").add_argument
    add("--arch", default="resnet50", help="resnet50, resnet50w2, resnet50w4, resnet50w5, or any torchvision or timm "
        "model name")  # fmt: skip
    add("--pretrained", default="", help="a file of any layout, the name of a release (swav_200ep), or random; without "
        "it the released weights of the architecture")  # fmt: skip
    add("--allow_partial", action="store_true", help="go on when the file does not fill the network")
    return parser


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Labelled images to learn from and to classify."""
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default=None, help="folder with train/ and val/, a folder with one folder per class, a .txt "
        "list or a torchvision data set name; without it the embedded digits")  # fmt: skip
    add("--val_path", default=None, help="images to classify; by default those that belong to --data_path")
    add("--allow_absolute_paths", action="store_true", help="in .txt lists")
    add("--image_size", type=int, default=224, help="side of the crops in pixels; for centre crops the short side "
        "is resized to 8/7 of it")  # fmt: skip


def add_training_flags(add: Callable[..., argparse.Action], epochs: int) -> None:
    """A training on labelled images; ``add`` is the ``add_argument`` of a group."""
    add("--num_labels", type=int, default=1000, help="outputs of the classifier")
    add("--on_bad_image", default="replace", choices=("replace", "error"), help="what an unreadable train image does")
    add("--max_bad_fraction", type=float, default=0.01,
        help="stop when more train images than this share are unreadable")  # fmt: skip
    add("--crop_scale", type=float, nargs=2, default=(0.08, 1.0), help="area range of the train crops")
    add("--epochs", type=int, default=epochs)
    add("--batch_size", type=int, default=32, help="images per process")
    add("--seed", type=int, default=31)


def add_run_flags(parser: argparse.ArgumentParser, what_to_validate: str) -> Callable[..., argparse.Action]:
    """Where a training leaves its files, and whether there is one; returns the ``add_argument`` of the group."""
    add = parser.add_argument_group("run").add_argument
    add("--dump_path", "--output_dir", default=".",
        help="for checkpoint.pth.tar and log.txt; not the folder of the training run")  # fmt: skip
    add("--evaluate", action="store_true", help=f"only validate {what_to_validate}")
    return add


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Device and loader flags, and those of the official launchers."""
    add = parser.add_argument_group("processes").add_argument
    add("--workers", "--num_workers", type=int, default=None,
        help="loader processes per rank (default: cores per rank - 1, max 10)")  # fmt: skip
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dist_url", default="env://", help="rendezvous of the processes")
    add("--world_size", type=int, default=-1, help="ignored: read from the environment")
    add("--rank", type=int, default=0, help="ignored: read from the environment")
    add("--local_rank", "--local-rank", type=int, default=0, help="ignored: read from the environment")


def parse_with_embedded_defaults(
    parser: argparse.ArgumentParser, arguments: list[str] | None, **defaults
) -> argparse.Namespace:
    """Parse and check; without ``--data_path`` the defaults are those for the embedded digits."""
    args = parser.parse_args(arguments)
    if args.data_path is None:
        parser.set_defaults(**defaults)
        args = parser.parse_args(arguments)
    for flag in ("epochs", "val_freq", "batch_size", "images_per_sheet", "max_sheets"):
        if (value := getattr(args, flag, None)) is not None and value < 1:
            parser.error(f"--{flag} {value} is less than 1")
    if args.workers is None:
        args.workers = default_num_workers()
    return args


# --- Data -------------------------------------------------------------------------------------------------------------


def labelled_sources(
    data_path: str | None, val_path: str | None, allow_absolute_paths: bool = False, num_labels: int | None = None
) -> tuple[ImageSource, ImageSource]:
    """Train and val images with classes.

    Raises:
        ValueError: If there are none, or they have more than ``num_labels`` classes.
    """
    sources = open_labelled(data_path, val_path, allow_absolute_paths)
    if num_labels is not None and num_labels < len(sources[0].classes):
        raise ValueError(
            f"--num_labels {num_labels} is less than the {len(sources[0].classes)} classes of {sources[0].name}"
        )
    return sources


def eval_transform(image_size: int, network: nn.Module) -> EvalTransform:
    """Resize (256 for a crop of 224), crop the centre, normalise, for the channels that the network takes."""
    return EvalTransform(round(image_size * 256 / 224), image_size, MEAN, STD, input_channels(network), "bilinear")


def train_loader(
    source: ImageSource,
    image_size: int,
    crop_scale: Sequence[float],
    batch_size: int,
    seed: int,
    in_chans: int,
    bad_images: BadImages,
    workers: int,
    device: torch.device,
    drop_single: bool = False,
) -> tuple[DataLoader, EpochBatchSampler]:
    """Random crops and flips of this process's share of the images, and the sampler that wants to know the epoch.

    Args:
        drop_single: Leave out the last batch of an epoch if it is a single image, which batch norms that see one pixel
            cannot normalise.
    """
    recipe = ViewRecipe(image_size, tuple(crop_scale), interpolation="bilinear")
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    per_rank = -(-len(source) // world_size)
    drop_last = drop_single and per_rank > 1 and per_rank % batch_size == 1
    sampler = EpochBatchSampler(len(source), batch_size, seed, rank, world_size, drop_last)
    dataset = MultiCropDataset(source, [recipe], seed, in_chans=in_chans, bad_images=bad_images)
    return make_loader(dataset, batch_sampler=sampler, num_workers=workers, device=device), sampler


def bad_images_of(source: ImageSource, args: argparse.Namespace) -> BadImages:
    """The policy of the flags for unreadable train images, listed in ``<dump_path>/bad_images.txt``."""
    folder = Path(args.dump_path)
    if distributed.is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    return BadImages(len(source), folder / "bad_images.txt", args.on_bad_image, args.max_bad_fraction)


def on_device(loader: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images and labels, with a progress bar on a terminal."""
    hidden = not (distributed.is_main_process() and sys.stderr.isatty())
    for views, labels, _ in tqdm(loader, leave=False, disable=hidden):
        yield normalize_views(views, device, MEAN, STD)[0], labels.to(device, non_blocking=True)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def resume(
    dump_path: str | Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    flags: dict,
    pretrained: int,
) -> tuple[int, list[dict]]:
    """Go on from ``<dump_path>/checkpoint.pth.tar``, ours or an official one, if there is one.

    Args:
        flags: Those that must be what they were, with their values.
        pretrained: Checksum of the weights that the evaluation started from.

    Returns:
        The first epoch that is still to be done, and the log of those before it.

    Raises:
        ValueError: If the checkpoint is not one of this run.
    """
    path = Path(dump_path) / "checkpoint.pth.tar"
    checkpoint = load_latest(path)
    if checkpoint is None:
        return 0, []
    if not {"epoch", "state_dict", "optimizer", "scheduler"} <= checkpoint.keys():
        raise ValueError(f"{path} is a checkpoint of another script; choose another --dump_path")
    if checkpoint.get("pretrained", pretrained) != pretrained:
        raise ValueError(f"{path} started from other weights than those of --pretrained; use another --dump_path")
    for flag, value in checkpoint.get("flags", {}).items():
        if flag in flags and flags[flag] != value:
            raise ValueError(
                f"--{flag} {flags[flag]} does not fit {path}, which was written with --{flag} {value}; use that or "
                "another --dump_path"
            )
    set_weights(module, checkpoint["state_dict"], path)
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])
    distributed.print_once(f"resuming at epoch {checkpoint['epoch']}")
    return checkpoint["epoch"], checkpoint.get("log", [])


def save_epoch(
    dump_path: str | Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    flags: dict,
    pretrained: int,
    log: list[dict],
    best_acc: float | tuple[float, float],
) -> None:
    """Write ``checkpoint.pth.tar`` with the keys of the official scripts and ours, and the log as JSON lines."""
    distributed.print_once("  ".join(f"{name} {value:.5g}" for name, value in log[-1].items()))
    if not distributed.is_main_process():
        return
    folder = Path(dump_path)
    state = {
        "epoch": log[-1]["epoch"] + 1,
        "state_dict": {f"module.{name}": value for name, value in module.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "best_acc": best_acc,
        "flags": flags,
        "pretrained": pretrained,
        "log": log,
    }
    save(folder / "checkpoint.pth.tar", state)
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in log))


def set_weights(module: nn.Module, state_dict: dict[str, Tensor], file: str | Path) -> None:
    """Load weights that were saved with the prefix ``module.``.

    Raises:
        ValueError: If names or shapes are not exactly those of ``module``.
    """
    weights = without_prefix(state_dict, "module.")
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"{file}: {len(different)} of {len(expected)} entries do not fit, the first is {name}: "
            f"{found.get(name, 'missing')} in the file, {expected.get(name, 'none')} in the network; check --arch, "
            "--num_labels and the flags of the classifier"
        )
    module.load_state_dict(weights)
