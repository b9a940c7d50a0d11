"""The flags of DeiT's training script, which later supervised recipes took over with their defaults."""

import argparse
from collections.abc import Callable, Mapping, Sequence

from shared.evaluation.flags import add_shared_classes_flag, take_from_run
from shared.images.inaturalist import CATEGORIES
from shared.networks.pretrained import flags_of_run
from shared.optimisation.accumulation import add_accumulation_flag
from shared.run.flags import (
    add_data_flags,
    add_run_flags,
    check_positive,
    parse_with_embedded_defaults,
    shorten_unset_warmup,
)

# What replaces the recipe's defaults when no images are named: a run of minutes needs little augmentation, no warm-up
# (its first two epochs would hardly learn) and a shorter moving average.
EMBEDDED_RECIPE = {
    "batch_size": 32,
    "epochs": 8,
    "drop_path": 0.0,
    "warmup_epochs": 0,
    "model_ema_decay": 0.98,
    "aa": "none",
    "repeated_aug": False,
    "reprob": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "output_dir": "runs/materials",
}
DATA_SETS = ("CIFAR10", "CIFAR100", "IMNET", "INAT", "INAT19", "CARS", "FLOWERS", "IMNET22k")
INAT_YEARS = {"INAT": 2018, "INAT19": 2019}
MINIMUM = {"epochs": 1, "batch_size": 1, "log_freq": 1, "input_size": 1, "test_freq": 1, "start_epoch": 0}
MINIMUM |= {"weight_decay": 0, "cutmix": 0}
SHARES = ("smoothing", "reprob", "mixup_prob", "mixup_switch_prob", "distillation_alpha", "model_ema_decay")


def add_data_set_flags(parser: argparse.ArgumentParser) -> None:
    """:func:`shared.run.flags.add_data_flags`, and which data set they lead to."""
    add_shared_classes_flag(add_data_flags(parser))
    add = parser.add_argument_group("data set").add_argument
    known = "CIFAR10, CIFAR100 (or CIFAR): torchvision's, in --data_path; INAT: with its JSON files; else class folders"
    cifar = {"CIFAR": "CIFAR100"}
    add("--data-set", default="IMNET", choices=DATA_SETS, help=known, type=lambda name: cifar.get(name, name))
    add("--inat-category", default="name", choices=CATEGORIES, help="what to classify in iNaturalist")


def add_network_flags(add: Callable) -> None:
    """Dropout, the moving average and ``--compile``; ``add`` is the ``add_argument`` of the network's group."""
    add("--drop", type=float, default=0.0, help="dropout")
    add("--drop-path", type=float, default=0.1, help="stochastic depth")
    add("--model-ema", action=argparse.BooleanOptionalAction, default=True, help="keep a moving average of the network")
    add("--model-ema-decay", type=float, default=0.99996, help="weight of the old average at every step")
    add("--model-ema-force-cpu", action="store_true", help="keep the average in the memory of the host")
    add("--compile", action="store_true", help="torch.compile the network; stochastic depth then draws otherwise")
    add_accumulation_flag(add)


def add_augmentation_flags(parser: argparse.ArgumentParser, color_jitter: float) -> Callable:
    """Views, Mixup, CutMix and label smoothing; returns the ``add_argument`` of the group for further flags."""
    add = parser.add_argument_group("augmentation").add_argument
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's AutoAugment or RandAugment specification; none")
    add("--color-jitter", type=float, default=color_jitter, help="strength; not used with --aa")
    add("--train-interpolation", default="bicubic", choices=("bicubic", "bilinear", "random"), help="of the crops")
    repeated = "three views of a third of the images per epoch"
    add("--repeated-aug", action=argparse.BooleanOptionalAction, default=True, help=repeated)
    add("--reprob", type=float, default=0.25, help="probability of Random Erasing")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help="what erased rectangles are filled with")
    add("--recount", type=int, default=1, help="number of rectangles")
    add("--resplit", action="store_true", help="not used, as in the official code")
    add("--mixup", type=float, default=0.8, help="alpha of Mixup; 0: none")
    add("--cutmix", type=float, default=1.0, help="alpha of CutMix; 0: none")
    add("--cutmix-minmax", type=float, nargs=2, default=None, help="range of CutMix's sides instead of --cutmix")
    add("--mixup-prob", type=float, default=1.0, help="probability of either")
    add("--mixup-switch-prob", type=float, default=0.5, help="probability of CutMix where both are on")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="what shares one mixing weight")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    return add


def add_distillation_flags(parser: argparse.ArgumentParser) -> None:
    """The teacher, and what is learned from it."""
    add = parser.add_argument_group("distillation").add_argument
    add("--teacher-model", default="regnety_160", help="a model of timm or torchvision")
    add("--teacher-path", default="", help="file or address of its weights")
    add("--distillation-type", default="none", choices=("none", "soft", "hard"), help="what is learned from it")
    add("--distillation-alpha", type=float, default=0.5, help="weight of the distillation")
    add("--distillation-tau", type=float, default=1.0, help="temperature of soft distillation")


def add_optimisation_flags(parser: argparse.ArgumentParser, epochs: int) -> Callable:
    """Epochs, batch, optimiser and schedule; returns the ``add_argument`` of the group for further flags."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=epochs, help="passes over the images")
    add("--batch-size", type=int, default=64, help="images per process; half as many again in evaluation")
    add("--opt", default="adamw", help="timm's name of the optimiser")
    add("--opt-eps", type=float, default=1e-8, help="its epsilon")
    add("--opt-betas", type=float, nargs="+", default=None, help="its betas; None: the optimiser's own")
    add("--clip-grad", type=float, default=None, help="cap of the norm of all gradients together; None: no cap")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--weight-decay", type=float, default=0.05, help="of matrices: not of biases, vectors and the class token")
    add("--sched", default="cosine", help="timm's name of the schedule")
    add("--lr", type=float, default=5e-4, help="peak learning rate for 512 images per step; scaled linearly")
    add("--lr-noise", type=float, nargs="+", default=None, help="share of the epochs from which (to which) it is noisy")
    add("--lr-noise-pct", type=float, default=0.67, help="largest relative noise")
    add("--lr-noise-std", type=float, default=1.0, help="standard deviation of the noise")
    add("--warmup-lr", type=float, default=1e-6, help="rate at the start of the warm-up; not scaled")
    add("--min-lr", type=float, default=1e-5, help="rate at the end; not scaled")
    add("--warmup-epochs", type=int, default=5, help="epochs of the warm-up")
    add("--decay-epochs", type=float, default=30, help="epochs per step of --sched step")
    add("--decay-rate", "--dr", type=float, default=0.1, help="factor of --sched step")
    add("--cooldown-epochs", type=int, default=10, help="not used, as in the official code")
    add("--patience-epochs", type=int, default=10, help="not used: --sched plateau is refused")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")
    return add


def add_evaluation_flags(parser: argparse.ArgumentParser, evaluated: str) -> Callable:
    """When to evaluate what; returns the ``add_argument`` of the group for further flags.

    Args:
        evaluated: What ``--eval`` looks at.
    """
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", action="store_true", help=f"evaluate {evaluated} or the run in --output_dir, and stop")
    add("--test-freq", type=int, default=1, help="epochs between evaluations")
    add("--eval-ema", action="store_true", help="evaluate the moving average too")
    return add


def add_output_flags(parser: argparse.ArgumentParser) -> Callable:
    """:func:`shared.run.flags.add_run_flags`, output, resume and seed; returns the ``add_argument`` of the group."""
    add = add_run_flags(parser, knn=False)
    add("--output_dir", default=".", help="checkpoints, logs and pictures")
    add("--resume", default="", help="checkpoint to go on from when --output_dir has none")
    add("--start_epoch", type=int, default=0, help="first epoch without a checkpoint")
    add("--seed", type=int, default=0, help="of the initial weights, the order of the images and the views")
    add("--dist-eval", action="store_true", help="not needed: evaluation is always shared out, and exact")
    add("--pin-mem", action=argparse.BooleanOptionalAction, default=True, help="not needed: done where there is a GPU")
    add("--world_size", type=int, default=1, help="ignored: read from the environment")
    return add


def parse_recipe(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, embedded_defaults: dict
) -> argparse.Namespace:
    """Parse and check the flags of this module; without any images the defaults are those of the embedded data.

    Images to evaluate on are enough for ``--eval``. The first flag whose value makes no sense ends the program.
    """
    args = parser.parse_args(arguments)
    data_flag = "data_path" if args.val_path is None else "val_path"
    args = parse_with_embedded_defaults(parser, arguments, embedded_defaults, MINIMUM, data_flag)
    shorten_unset_warmup(parser, args, arguments)
    for flag in SHARES:
        if not 0 <= getattr(args, flag) <= 1:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} is not in [0, 1]")
    for flag in ("drop", "drop_path"):
        if not 0 <= getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} is not in [0, 1)")
    low, high = args.cutmix_minmax or (0, 1)
    if not 0 <= low < high <= 1:
        parser.error(f"--cutmix-minmax {low} {high}: expected a range of shares of a side, 0 <= low < high <= 1")
    check_positive(parser, args, "clip_grad", "distillation_tau")
    if args.eval_ema and not args.model_ema:
        parser.error("--eval-ema: there is no moving average with --no-model-ema")
    if args.eval:
        return args
    if args.start_epoch >= args.epochs:
        parser.error(f"--start_epoch {args.start_epoch} leaves nothing of --epochs {args.epochs} to train")
    if mixes_labels(args) and args.batch_size % 2:
        parser.error(f"--batch-size {args.batch_size}: Mixup and CutMix take pairs of images, so it must be even")
    if args.distillation_type != "none" and not args.teacher_path:
        parser.error(f"--distillation-type {args.distillation_type} needs the teacher's weights as --teacher-path")
    return args


def check_against_run(args: argparse.Namespace, weights: str, *names: str) -> Mapping:
    """The flags of the run whose checkpoint ``--eval`` looks at; ``ValueError`` if it contradicts one of ``names``."""
    trained_with = flags_of_run(weights)
    take_from_run(args, trained_with, {name: name for name in names}, {})
    return trained_with


def mixes_labels(args: argparse.Namespace) -> bool:
    """Whether Mixup or CutMix is on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
