"""One ViT for all patch sizes: train with a patch size that is drawn at every step.

Beyer et al., "FlexiViT: One Model for All Patch Sizes", CVPR 2023.

    python main.py                                                        # embedded materials, minutes on a CPU
    torchrun --nproc_per_node=8 main.py --arch flexivit_b --data_path /path/to/imagenet --patch_size 16 \\
        --teacher TEACHER.pth --teacher_input_size 384 --aa none --mixup 1 --lr 1e-4 --weight_decay 1e-5 \\
        --warmup_steps 5000 --output_dir /path/to/run                     # distillation, the published recipe

Patch embedding and positions are resized to the drawn size (:mod:`flexivit.flexible_vit`); nothing else differs from
the training of a ViT with labels. ``--teacher`` learns from another ViT instead of the labels, and starts from its
weights.
Running the same command again resumes the run.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexivit.checkpoints import NORMALISATIONS, load_flexible, start_from
from flexivit.flexible_vit import AtPatchSize, FlexiViT
from flexivit.hub import CARD, MEAN, STD, build
from flexivit.losses import DISTANCES, distance, sigmoid_cross_entropy, softmax_cross_entropy
from flexivit.report import report
from shared import distributed
from shared.images.labelled import check_classes
from shared.networks.compiling import compile_network
from shared.optimisation.accumulation import accumulate, add_accumulation_flag
from shared.optimisation.optim import clip_total_grad_norm_, decay_groups
from shared.run.flags import (
    Parser,
    add_run_flags,
    check_positive,
    parse_with_embedded_defaults,
    tell_embedded_defaults,
)
from shared.run.run import Run
from shared.supervised.data import LabelledImages, open_images, train_batches
from shared.supervised.flags import add_data_set_flags
from shared.supervised.transforms import TrainTransform

EMBEDDED_DATA_DEFAULTS = {
    "arch": "flexivit_micro",
    "patch_size": 8,
    "posemb_grid": 4,
    "input_size": 32,
    "grids": (2, 3, 4, 5, 8),
    "crop_scale": (0.4, 1.0),
    "aa": "none",
    "mixup": 0.0,
    "loss": "softmax",
    "epochs": 12,
    "batch_size": 32,
    "lr": 1e-3,
    "output_dir": "runs/materials",
}
MINIMUM = dict.fromkeys("epochs batch_size input_size patch_size posemb_grid log_freq test_freq".split(), 1)
MINIMUM |= {"weight_decay": 0}
NOT_DECAYED = ("pos_embed", "cls_token", "attn_pool.latent")  # of what has more than one dimension
NETWORK_FLAGS = ("arch", "patch_size", "posemb_grid", "positions", "pool", "in_chans")
LOSSES = {"sigmoid": sigmoid_cross_entropy, "softmax": softmax_cross_entropy}
CROP_RATIO = 240 / 272  # of the centre crop that is evaluated


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_data_set_flags(parser)
    add = parser.add_argument_group("patch sizes").add_argument
    grids = "patches a side that are drawn from: of 240 pixels, patches of 48, 40, 30, 24, 20, 16, 15, 12, 10 and 8"
    add("--grids", type=int, nargs="+", default=(5, 6, 8, 10, 12, 15, 16, 20, 24, 30), help=grids)
    add("--grid_weights", type=float, nargs="+", default=None, help="how often each is drawn; None: all alike")
    add("--patch_size", type=int, default=32, help="side in pixels of the underlying patch embedding")
    add("--posemb_grid", type=int, default=7, help="side of the underlying grid of position embeddings")

    add = parser.add_argument_group("network").add_argument
    add("--arch", default="flexivit_b", help="flexivit_ti, flexivit_s, flexivit_b, flexivit_l, flexivit_h")
    add("--positions", default="learn", choices=("learn", "sincos2d"), help="position embeddings")
    add("--pool", default="tok", choices=("tok", "gap", "map"), help="class token, mean, or attention pooling")
    add("--input_size", type=int, default=240, help="side of the images in pixels")
    add("--compile", action="store_true", help="torch.compile the blocks, for any number of patches")
    add_accumulation_flag(add)

    add = parser.add_argument_group("augmentation").add_argument
    add("--crop_scale", type=float, nargs=2, default=(0.05, 1.0), help="area range of the crops")
    add("--aa", default="rand-m10-n2", help="timm's RandAugment specification; none")
    add("--mixup", type=float, default=0.2, help="alpha of Mixup, of the whole batch; 0: none")

    add = parser.add_argument_group("distillation").add_argument
    teacher = "a ViT to learn from instead of the labels: file or release; it sees the same crops and mixtures"
    add("--teacher", default="", help=teacher)
    images = "of the teacher's images, imagenet's or 0.5 (half); None: what its file says, else imagenet"
    add("--teacher_normalisation", default=None, choices=tuple(NORMALISATIONS), help=images)
    add("--teacher_input_size", type=int, default=None, help="side of its images in pixels; None: --input_size")
    add("--distance", default="kl", choices=[kind for kind in DISTANCES if kind != "agree"], help="what is minimised")
    add("--temperature", type=float, default=1.0, help="of --distance kl")
    add("--init", default="teacher", choices=("teacher", "random"), help="weights to start from, with --teacher")

    add = parser.add_argument_group("optimisation").add_argument
    add("--loss", default="sigmoid", choices=tuple(LOSSES), help="of the labels")
    add("--epochs", type=int, default=90, help="passes over the images")
    add("--batch_size", type=int, default=64, help="images per process; 4096 (1024 to distil) in all when published")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--weight_decay", type=float, default=1e-4, help="of matrices; follows the schedule, but is no part of --lr")
    warmup = "steps of linear warm-up; None: 10,000, or a tenth of the run if that is less"
    add("--warmup_steps", type=int, default=None, help=warmup)
    add("--clip_grad", type=float, default=1.0, help="cap of the norm of all gradients together")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")

    add = parser.add_argument_group("evaluation").add_argument
    add("--test_freq", type=int, default=1, help="epochs between evaluations")
    add("--test_grids", type=int, nargs="+", default=None, help="None: the smallest, the middle and the largest")

    add = add_run_flags(parser, knn=False)
    add("--output_dir", default=".", help="checkpoints, logs and pictures")
    add("--seed", type=int, default=0, help="of the initial weights, the order of the images and the views")
    parser.set_defaults(eval=False, repeated_aug=False)
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line, of ``parser`` if further flags are in it.

    Without ``--data_path`` the defaults are those of the embedded data.
    """
    parser = parser or get_args_parser()
    args = parse_with_embedded_defaults(parser, arguments, EMBEDDED_DATA_DEFAULTS, MINIMUM)
    if args.test_grids is None:
        ordered = sorted(args.grids)
        args.test_grids = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
    args.test_grids = sorted(set(args.test_grids))  # the last one gives test_acc1
    for flag, grids in (("grids", args.grids), ("test_grids", args.test_grids)):
        if min(grids) < 1 or max(grids) > args.input_size:
            parser.error(f"--{flag} {' '.join(map(str, grids))}: an image of {args.input_size} pixels has no such grid")
    if (weights := args.grid_weights) is not None and (
        len(weights) != len(args.grids) or min(weights) < 0 or sum(weights) <= 0
    ):
        parser.error(f"--grid_weights: expected a weight for each of the {len(args.grids)} --grids, not all of them 0")
    check_positive(parser, args, "lr", "clip_grad")
    return args


# --- What is drawn and scheduled --------------------------------------------------------------------------------------


def draw_grid(step: int, grids: Sequence[int], weights: Sequence[float] | None, ids: tuple[int, int] = (0, 0)) -> int:
    """Patches a side at a step, the same on every process, which depends on nothing else (section 3.2).

    Args:
        weights: How often each grid is drawn; None: all alike.
        ids: Numbers of the experiment and the worker in the published runs; negative ones count as 0.
    """
    generator = np.random.default_rng([max(number, 0) for number in (*ids, step)])
    shares = None if weights is None else np.asarray(weights, dtype=float) / sum(weights)
    return int(generator.choice(grids, p=shares))


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """Linear warm-up from 0, then half a cosine to 0."""
    progress = min(max((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0), 1.0)
    return min(1.0, step / max(warmup_steps, 1)) * (1 + math.cos(math.pi * progress)) / 2


def mix(images: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Mixup of a batch with itself, moved on by one, with one weight a >= 1/2 of Beta(alpha, alpha) for all."""
    if not alpha:
        return images, targets
    a = float(torch.distributions.Beta(alpha, alpha).sample())
    a = max(a, 1 - a)
    return a * images + (1 - a) * images.roll(1, 0), a * targets + (1 - a) * targets.roll(1, 0)


# --- Training ---------------------------------------------------------------------------------------------------------


def train_flexivit(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from the start if there is none."""
    run = Run(args, args.amp)

    # images: one crop for student and teacher, at the size of the larger one
    images = open_images(args, run.output_dir, run.precision, MEAN, STD, CROP_RATIO, CARD.interpolation)
    side = max(args.input_size, (args.teacher and args.teacher_input_size) or 0)
    options = {"auto_augment": None if args.aa == "none" else args.aa, "color_jitter": None, "erase_p": 0.0}
    transform = TrainTransform(side, MEAN, STD, in_chans=args.in_chans, crop_scale=tuple(args.crop_scale), **options)
    data = train_batches(args, images, transform, run.device)
    total_steps = args.epochs * data.steps_per_epoch
    distributed.print_once(f"{images.train.describe()}: {data.steps_per_epoch} steps per epoch")
    tell_embedded_defaults(args.data_path, EMBEDDED_DATA_DEFAULTS)

    # network, teacher, loss
    underlying = {"patch_size": args.patch_size, "grid": (args.posemb_grid,) * 2}
    options = underlying | {"num_classes": images.num_classes, "positions": args.positions, "pool": args.pool}
    network = build(args.arch, args.in_chans, **options)
    if args.loss == "sigmoid":
        nn.init.constant_(network.head.bias, -10.0)
    if args.teacher:
        teacher = load_flexible(args.teacher, "--teacher", args.teacher_normalisation).requires_grad_(False)
        if args.init == "teacher":
            start_from(network, teacher)
        check_classes("--teacher", args.teacher, images.train.classes)
        criterion = Distillation(teacher.to(run.device), args, images.num_classes)
    else:
        criterion = Labels(LOSSES[args.loss], args.input_size)
    network = network.to(run.device)
    if args.compile:
        for block in network.blocks:  # what resizes weights and positions caches its matrices, and stays as it is
            compile_network(block, dynamic=True)
    accumulate(network, args.accumulate)
    model = distributed.wrap(network, run.device)

    # torch multiplies the decay by the learning rate; divided by the peak here, only the schedule is left of that
    groups = decay_groups(network, NOT_DECAYED, args.weight_decay / args.lr)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    warmup_steps = min(10_000, total_steps // 10) if args.warmup_steps is None else args.warmup_steps

    run.classes = images.train.classes
    run.resume(data, total_steps, NETWORK_FLAGS, model=model, optimizer=optimizer)
    with run:
        if run.is_new:
            evaluate(run, images, network, args.test_grids)
        for epoch in run.epochs():
            data.sampler.set_epoch(epoch, run.step_in_epoch)
            train_one_epoch(run, model, criterion, data.loader, optimizer, args, warmup_steps, images.num_classes)
            tested = {}
            if (epoch + 1) % args.test_freq == 0 or epoch + 1 == args.epochs:
                tested = evaluate(run, images, network, args.test_grids)
            run.log_epoch(**tested, bad_images=images.bad_images.count())
            run.end_epoch()
    report(run, network, images)


def train_one_epoch(
    run: Run,
    model: nn.Module,
    criterion: Callable[[nn.Module, Tensor, Tensor, int], Tensor],
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
    warmup_steps: int,
    num_classes: int,
) -> None:
    """One epoch (Algorithm 1): draw a grid, resize patch embedding and positions to it, and learn as ever.

    Args:
        criterion: Maps the network, mixed images (B, C, H, W) and labels (B, classes), and the grid to losses (B,).
        loader: Yields (views, labels, indices).
    """
    parameters = list(model.parameters())
    for step, (views, labels, _) in run.steps(loader):
        grid = draw_grid(step, args.grids, args.grid_weights, (args.seed, 0))
        lr = args.lr * learning_rate_factor(step, run.total_steps, warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        targets = F.one_hot(labels.to(run.device, non_blocking=True), num_classes).float()
        images, targets = mix(views.to(run.device, non_blocking=True), targets, args.mixup)
        optimizer.zero_grad(set_to_none=True)

        with run.precision.autocast():
            loss = criterion(model, images, targets, grid).mean()

        run.backward(loss, optimizer)
        run.update(clip_total_grad_norm_(parameters, args.clip_grad), optimizer)
        run.end_step(len(labels), {"loss": loss}, {"lr": lr})


def resized(images: Tensor, side: int) -> Tensor:
    """Images (B, C, H, W) with sides of ``side`` pixels, antialiased."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)


class Labels:
    """The loss of the labels."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], input_size: int):
        self.loss, self.input_size = loss, input_size

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor, grid: int) -> Tensor:
        return self.loss(model(resized(images, self.input_size), grid=grid).float(), targets)


class Distillation:
    """The distance to a teacher that sees the same images at its own size, in its own patches (section 3.4).

    Raises:
        ValueError: If it tells other classes apart.
    """

    def __init__(self, teacher: FlexiViT, args: argparse.Namespace, num_classes: int):
        if getattr(teacher.head, "out_features", 0) != num_classes:
            raise ValueError(f"--teacher {args.teacher} is no classifier of the {num_classes} classes of the images")
        self.teacher, self.kind, self.temperature = teacher, args.distance, args.temperature
        self.sizes = args.input_size, args.teacher_input_size or args.input_size

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor, grid: int) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(resized(images, self.sizes[1])).float()
        return distance(model(resized(images, self.sizes[0]), grid=grid).float(), wanted, self.kind, self.temperature)


def evaluate(run: Run, images: LabelledImages, network: FlexiViT, grids: Sequence[int]) -> dict[str, float]:
    """Accuracy at each of the grids; ``test_acc1`` is that of the largest."""
    tested = {}
    for grid in grids:
        result = images.evaluate(AtPatchSize(network, grid=grid), between_batches=run.stop_if_asked)
        tested |= {f"test_acc1_grid{grid}": result["acc1"], "test_acc1": result["acc1"], "test_loss": result["loss"]}
    run.log_evaluation(**tested)
    return tested


def main() -> None:
    with distributed.clean_exit():
        train_flexivit(parse_args())


if __name__ == "__main__":
    main()
