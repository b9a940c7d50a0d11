"""The recipe of ViT-22B: parallel blocks, normalised queries and keys, sigmoid loss, a mesh of devices.

Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", ICML 2023.

    python main.py                                                        # embedded materials, minutes on a CPU
    torchrun --nproc_per_node=8 main.py --arch vit_l --mesh 4 2 --data_path /path/to/imagenet --output_dir /path/to/run

The log has the largest attention logit and the entropy of the attention of every block, and a sentence when they run
away. ``--mesh DATA MODEL`` shares the network out over processes (:mod:`vit22b.mesh`); without it each has the whole.
Running the same command again resumes the run, with any mesh.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import distributed
from shared.networks.compiling import compile_network
from shared.optimisation.optim import decay_groups
from shared.plan import tell_large
from shared.run.flags import (
    Parser,
    add_run_flags,
    bool_flag,
    check_positive,
    parse_with_embedded_defaults,
    tell_embedded_defaults,
)
from shared.run.run import Run
from shared.run.settings import long_warmup, tell_settings
from shared.supervised.data import LabelledImages, open_images, train_batches
from shared.supervised.flags import add_data_set_flags
from shared.supervised.transforms import TrainTransform
from vit22b.hub import MEAN, STD, build
from vit22b.mesh import MeshShare, OnMesh, OptimizerOnMesh, OwnImages, build_on_mesh, clip_gradients_, open_mesh
from vit22b.monitor import AttentionMonitor, health_rules
from vit22b.report import report
from vit22b.scaled_vit import NORMS, ScaledViT, Switches

EMBEDDED_DATA_DEFAULTS = {
    "arch": "vit_micro",
    "patch_size": 4,
    "input_size": 32,
    "crop_scale": (0.4, 1.0),
    "loss": "softmax",
    "epochs": 8,
    "batch_size": 32,
    "timescale": 200,
    "warmup_steps": 60,
    "cooldown_steps": 120,
    "output_dir": "runs/materials",
}
MINIMUM = dict.fromkeys(("epochs", "batch_size", "input_size", "patch_size", "log_freq", "test_freq", "timescale"), 1)
SWITCHES = ("qk_norm", "qkv_bias", "out_bias", "mlp_bias")
NETWORK_FLAGS = ("arch", "patch_size", "input_size", "block", "norm", *SWITCHES, "pool", "in_chans")
NOT_DECAYED = ("patches.positions", "pool.probe")  # of what has more than one dimension
CROP_RATIO = 0.875  # of the centre crop that is evaluated


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_data_set_flags(parser)
    add = parser.add_argument_group("network").add_argument
    add("--arch", default="vit_b", help="vit_ti, vit_s, vit_b, vit_l, vit_g, vit_e, vit_22b")
    add("--patch_size", type=int, default=14, help="side in pixels")
    add("--input_size", type=int, default=224, help="side of the images in pixels")
    blocks = "attention and MLP at once or one after the other; unfused: at once, in products of their own"
    add("--block", default="parallel", choices=("parallel", "unfused", "sequential"), help=blocks)
    add("--norm", default="rmsnorm", choices=NORMS, help="of all norms")
    add("--qk_norm", type=bool_flag, default=True, help="normalise queries and keys")
    add("--qkv_bias", type=bool_flag, default=False, help="biases of queries, keys and values")
    add("--out_bias", type=bool_flag, default=True, help="bias of the attention's output")
    add("--mlp_bias", type=bool_flag, default=True, help="biases of the MLPs")
    add("--pool", default="map", choices=("map", "gap"), help="attention pooling, or the mean of the tokens")
    add("--compile", action="store_true", help="torch.compile the blocks; the steps that are logged are not compiled")

    add = parser.add_argument_group("optimisation").add_argument
    add("--crop_scale", type=float, nargs=2, default=(0.05, 1.0), help="area range of the training crops")
    add("--loss", default="sigmoid", choices=("sigmoid", "softmax"), help="cross-entropy")
    add("--head_bias", type=float, default=-10.0, help="of the classifier at the start, with --loss sigmoid")
    add("--epochs", type=int, default=90, help="passes over the images")
    add("--batch_size", type=int, default=64, help="images per process; 65,536 in all when published")
    add("--lr", type=float, default=1e-3, help="peak of the reciprocal square root")
    add("--timescale", type=int, default=10_000, help="steps after the warm-up until it has fallen to 0.71 of that")
    add("--warmup_steps", type=int, default=10_000, help="linear from 0")
    add("--cooldown_steps", type=int, default=30_000, help="linear to 0, at the end")
    add("--weight_decay", type=float, default=0.03, help="of matrices in the body, multiplied by the learning rate")
    add("--head_weight_decay", type=float, default=3.0, help="of the classifier")
    add("--clip_grad", type=float, default=1.0, help="cap of the norm of all gradients together")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")
    mesh = "share the network out over DATA x MODEL processes; without it each process has the whole"
    add("--mesh", type=int, nargs=2, default=None, metavar=("DATA", "MODEL"), help=mesh)

    add = add_run_flags(parser, knn=False)
    add("--test_freq", type=int, default=1, help="epochs between evaluations")
    add("--output_dir", default=".", help="checkpoints, logs and pictures")
    add("--seed", type=int, default=0, help="of the initial weights, the order of the images and the views")
    parser.set_defaults(eval=False, repeated_aug=False)
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; without ``--data_path`` the defaults are those of the embedded data."""
    parser = parser or get_args_parser()
    args = parse_with_embedded_defaults(parser, arguments, EMBEDDED_DATA_DEFAULTS, MINIMUM)
    if rest := args.input_size % args.patch_size:
        given = f"--patch_size {args.patch_size}: --input_size {args.input_size}"
        parser.error(f"{given} is no multiple, the last {rest} pixels of every side would not be seen")
    check_positive(parser, args, "lr", "clip_grad")
    if args.mesh is not None and (min(args.mesh) < 1 or args.amp == "fp16"):
        parser.error(f"--mesh {args.mesh[0]} {args.mesh[1]} needs at least 1 process on each axis, and not --amp fp16")
    return args


def learning_rate_factor(
    step: int, total_steps: int, warmup_steps: int, cooldown_steps: int, timescale: int, shift: int = 0
) -> float:
    """Reciprocal square root of the steps after the warm-up, with a linear start and end.

    1 / sqrt(1 + (step + shift - warmup_steps) / timescale), which does not begin to fall before the warm-up's end.
    """
    factor = (1 + (max(step - warmup_steps, 0) + shift) / timescale) ** -0.5
    start = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return factor * start * (min(1.0, (total_steps - step) / cooldown_steps) if cooldown_steps else 1.0)


def sigmoid_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of every class, summed: (B, K) and targets (B, K) in [0, 1] to (B,)."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)


# --- Training ---------------------------------------------------------------------------------------------------------


def train_vit22b(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from the start if there is none."""
    run = Run(args, args.amp)

    # images, of which every process loads its own, on a mesh too
    images = open_images(args, run.output_dir, run.precision, MEAN, STD, CROP_RATIO)
    options = {"auto_augment": None, "color_jitter": None, "erase_p": 0.0, "crop_scale": tuple(args.crop_scale)}
    data = train_batches(
        args, images, TrainTransform(args.input_size, MEAN, STD, in_chans=args.in_chans, **options), run.device
    )
    total_steps = args.epochs * data.steps_per_epoch
    distributed.print_once(f"{images.train.describe()}: {data.steps_per_epoch} steps per epoch")
    tell_settings(
        args,
        long_warmup("--warmup_steps", args.warmup_steps, total_steps, "steps"),
        long_warmup("--cooldown_steps", args.cooldown_steps, total_steps, "steps", "cooldown"),
    )
    tell_embedded_defaults(args.data_path, EMBEDDED_DATA_DEFAULTS)

    # network: its blocks, and who holds them
    parallel = {"parallel": args.block != "sequential", "fused": args.block == "parallel"}
    switches = Switches(**parallel, norm=args.norm, **{name: getattr(args, name) for name in SWITCHES})
    sizes = {"patch_size": args.patch_size, "img_size": args.input_size, "num_classes": images.num_classes}
    head_bias = args.head_bias if args.loss == "sigmoid" else 0.0
    options = sizes | {"switches": switches, "pool": args.pool, "head_bias": head_bias}
    network_of = partial(build, args.arch, args.in_chans, **options)
    tell_large(network_of, run.device, math.prod(args.mesh or (1,)), 2, "--mesh")
    if args.mesh is None:
        network = network_of().to(run.device)
        model = distributed.wrap(network, run.device)
    else:
        network = model = build_on_mesh(network_of, open_mesh(*args.mesh, run.device), run.device)
    if args.compile:
        for block in network.blocks:
            compile_network(block)

    groups = decay_groups(network, NOT_DECAYED, args.weight_decay, args.head_weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    parts = {"model": model, "optimizer": optimizer}
    if args.mesh is not None:
        parts["model"] = held = OnMesh(network)
        parts["optimizer"] = OptimizerOnMesh(optimizer, held, ("lr",))
    schedule = total_steps, args.warmup_steps, args.cooldown_steps, args.timescale
    softmax = partial(F.cross_entropy, reduction="none")
    criterion = sigmoid_cross_entropy if args.loss == "sigmoid" else softmax
    monitor = AttentionMonitor(network)
    run.health.rules = health_rules(args.qk_norm)

    run.classes = images.train.classes
    run.resume(data, total_steps, NETWORK_FLAGS, **parts)
    run.guard.watch(model=network)
    with run:
        if run.is_new:
            evaluate(run, images, network)
        for epoch in run.epochs():
            data.sampler.set_epoch(epoch, run.step_in_epoch)
            train_one_epoch(run, model, criterion, data.loader, optimizer, schedule, monitor, images.num_classes)
            tested = {}
            if (epoch + 1) % args.test_freq == 0 or epoch + 1 == args.epochs:
                tested = evaluate(run, images, network)
            run.log_epoch(**tested, bad_images=images.bad_images.count())
            run.end_epoch()
    report(run, images)


def train_one_epoch(
    run: Run,
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    schedule: tuple[int, ...],
    monitor: AttentionMonitor,
    num_classes: int,
) -> None:
    """One epoch.

    Args:
        criterion: Maps logits and labels (B, classes) to losses (B,).
        loader: Yields (views, labels, indices).
        schedule: Arguments of :func:`learning_rate_factor`.
    """
    network = distributed.unwrap(model)
    for step, (views, labels, _) in run.steps(loader):
        lr = run.args.lr * learning_rate_factor(step, *schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        views, labels = views.to(run.device, non_blocking=True), labels.to(run.device, non_blocking=True)
        own = len(views)
        if isinstance(network.share, MeshShare):  # processes that hold a network together see the same images
            views, labels = network.share.images_of_row(views, labels)
        optimizer.zero_grad(set_to_none=True)

        with run.precision.autocast(), monitor.watching(run.logs_this_step):
            logits = model(views).float()
        loss = criterion(logits, F.one_hot(labels, num_classes).float()).mean()

        run.backward(loss, optimizer)
        run.update(clip_gradients_(network, run.args.clip_grad), optimizer)
        run.end_step(own, {"loss": loss}, {"lr": lr, **monitor.values()})


def evaluate(run: Run, images: LabelledImages, network: ScaledViT) -> dict[str, float]:
    """Accuracy, written to the log."""
    of_process = OwnImages(network) if isinstance(network.share, MeshShare) else network
    result = images.evaluate(of_process, between_batches=run.stop_if_asked)
    tested = {f"test_{name}": result[name] for name in ("acc1", "loss")}
    run.log_evaluation(**tested)
    return tested


def main() -> None:
    with distributed.clean_exit():
        train_vit22b(parse_args())


if __name__ == "__main__":
    main()
