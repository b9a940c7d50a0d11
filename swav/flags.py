"""Flags that SwAV and DeepCluster-v2 have in common, with the official names and defaults.

Every function adds a group and returns its ``add_argument``, with which a script adds its own flags to the group.
"""

import argparse
from collections.abc import Callable, Sequence

from shared.images.resolutions import add_resolution_flags, check_assigned_crops
from shared.optimisation.accumulation import add_accumulation_flag
from shared.run import flags

# of all crops (multi-crop, section 3.2)
FLIP_COLOR_AND_BLUR = {"flip_p": 0.5, "jitter": (0.8, 0.8, 0.8, 0.2), "jitter_p": 0.8, "grey_p": 0.2, "blur_p": 0.5}
SYNC_BN = ("pytorch", "apex", "none")
MINIMUM = {"epochs": 1, "batch_size": 1, "feat_dim": 1, "hidden_mlp": 0, "log_freq": 1, "syncbn_process_group_size": 1}
MINIMUM |= {"queue_length": 0, "wd": 0}


def add_view_flags(parser: argparse.ArgumentParser) -> Callable:
    """Multi-crop."""
    return add_resolution_flags(parser, [2], [224], [0.14], [1.0])


def add_network_flags(parser: argparse.ArgumentParser) -> Callable:
    """Trunk and projection head."""
    add = parser.add_argument_group("network").add_argument
    add("--arch", default="resnet50", help="resnet50, resnet50w2, resnet50w4, resnet50w5; torchvision's, timm's models")
    add("--hidden_mlp", type=int, default=2048, help="hidden width of the projection head; 0: a linear head")
    add("--feat_dim", type=int, default=128, help="dimension of the embeddings")
    statistics = "batch-norm statistics of all processes (pytorch), of groups of them (apex), of each alone (none)"
    add("--sync_bn", default="pytorch", choices=SYNC_BN, help=statistics)
    add("--syncbn_process_group_size", type=int, default=8, help="processes per group with --sync_bn apex")
    add("--compile", action="store_true", help="torch.compile the backbone")
    add_accumulation_flag(add)
    return add


def add_optimisation_flags(parser: argparse.ArgumentParser) -> Callable:
    """LARC, its schedule and mixed precision."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=100, help="passes over the images")
    add("--batch_size", type=int, default=64, help="images per process")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")
    add("--base_lr", type=float, default=4.8, help="peak learning rate; it is not scaled with the batch")
    add("--final_lr", type=float, default=0.0, help="learning rate at the end")
    add("--warmup_epochs", type=float, default=10, help="epochs (or parts of one) of linear learning-rate warm-up")
    add("--start_warmup", type=float, default=0.0, help="learning rate at the start of the warm-up")
    add("--wd", type=float, default=1e-6, help="weight decay")
    return add


def add_run_flags(parser: argparse.ArgumentParser) -> Callable:
    """Output, checkpoints, evaluation, processes."""
    add = flags.add_run_flags(parser)
    add("--dump_path", "--output_dir", default=".", dest="output_dir", help="checkpoints, logs and pictures")
    add("--checkpoint_freq", type=int, default=25, help="keep a checkpoint every so many epochs, and the last; 0: none")
    add("--seed", type=int, default=31, help="of the initial weights, the order of the images and the views")
    for name in ("--world_size", "--rank"):
        add(name, type=int, default=None, help="ignored: read from the environment")
    return add


def parse_and_check(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, embedded_defaults: dict
) -> argparse.Namespace:
    """Parse and check the command line; without ``--data_path`` the defaults are those of the embedded data."""
    args = flags.parse_with_embedded_defaults(parser, arguments, embedded_defaults, MINIMUM)
    flags.shorten_unset_warmup(parser, args, arguments)
    if args.epochs < args.warmup_epochs:
        parser.error(f"--epochs {args.epochs} is less than --warmup_epochs {args.warmup_epochs}")
    flags.check_positive(parser, args, "temperature", "epsilon")
    check_assigned_crops(parser, args)
    return args
