"""A ViT for images of any size and shape: train it on sequences into which whole images are packed.

Dehghani et al., "Patch n' Pack: NaViT, a Vision Transformer for any Aspect Ratio and Resolution", NeurIPS 2023.

    python main.py                                                        # generated images of many shapes, minutes
    torchrun --nproc_per_node=8 main.py --arch navit_b --data_path /path/to/imagenet --output_dir /path/to/run
    python main.py --loss contrastive --data_path captions.tsv --output_dir /path/to/run     # image <tab> caption

Nothing is cropped or squashed: an effective resolution (the side of a square of as many pixels) is drawn for every
image, tokens are dropped, and what is left is packed (:mod:`navit.pack`). The log states the resolution and the tokens
of an image. Running the same command again resumes the run.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from navit.eval_resolutions import Classifier, classify, measure, open_images
from navit.hub import build
from navit.losses import contrastive_loss, mean_over_processes, sigmoid_cross_entropy
from navit.native_resolution_vit import CHOICES, Block, ImageText, Packed
from navit.pack import PackedBatches, TrainPatches, pack_texts
from navit.report import report
from navit.sampling import DROPS, Dropping, Resolutions
from shared import distributed
from shared.evaluation.flags import add_shared_classes_flag
from shared.images.cache import cache_images
from shared.images.loading import BadImages, default_num_workers
from shared.images.sources import ImageSource, ask_about_classes
from shared.networks.compiling import compile_network
from shared.optimisation.optim import clip_total_grad_norm_, decay_groups
from shared.run.flags import (
    Parser,
    add_data_flags,
    add_run_flags,
    bool_flag,
    check_positive,
    parse_with_embedded_defaults,
    tell_embedded_defaults,
)
from shared.run.run import Run

EMBEDDED_DATA_DEFAULTS = {
    "arch": "navit_micro",
    "patch_size": 4,
    "max_side": 16,
    "resolution": (14.0, 32.0),
    "sequence_length": 128,
    "batch_size": 8,
    "drop": "none",
    "loss": "softmax",
    "epochs": 12,
    "lr": 1e-3,
    "weight_decay_head": 0.03,
    "output_dir": "runs/materials",
}
MINIMUM = dict.fromkeys(
    "epochs batch_size patch_size sequence_length max_open max_side text_length chunks log_freq test_freq".split(), 1
) | {"weight_decay": 0, "weight_decay_head": 0}
NETWORK_FLAGS = "arch patch_size positions coordinates max_side norm qk_norm pool in_chans".split()
NOT_DECAYED = ("pos_embed", "latent")  # of what has more than one dimension
LOSSES = {"sigmoid": sigmoid_cross_entropy, "softmax": partial(F.cross_entropy, reduction="none")}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_shared_classes_flag(add_data_flags(parser))
    add = parser.add_argument_group("resolution").add_argument
    add("--resolution", type=float, nargs=2, default=(64.0, 256.0), help="range of effective resolutions in pixels")
    draws = "uniform; normal: of --resolution_mean and deviation 1 on [-1, 1]"
    add("--resolution_draw", default="uniform", choices=("uniform", "normal"), help=draws)
    add("--resolution_mean", type=float, default=-0.5, help="of normal, where -1 is the low end of the range")
    add("--resolution_sample", default="side", choices=("side", "area"), help="what the draw is linear in")
    add("--flip", type=bool_flag, default=True, help="mirror half of the images")

    add = parser.add_argument_group("packing").add_argument
    add("--sequence_length", type=int, default=256, help="tokens; an image that does not fit is made smaller")
    add("--batch_size", type=int, default=64, help="sequences per process; about 4,000 in all when published")
    add("--max_open", type=int, default=16, help="sequences that wait for images at a time: more leave less padding")

    add = parser.add_argument_group("token dropping").add_argument
    kinds = "constant rate; beta: drawn per image; resolution: larger images drop more"
    add("--drop", default="resolution", choices=DROPS, help=kinds)
    add("--drop_rate", type=float, default=0.5, help="constant rate, or mean of beta")
    add("--drop_max", type=float, default=0.9, help="largest rate of beta")
    add("--drop_range", type=float, nargs=2, default=(0.2, 0.8), help="rates by resolution, or of the schedule")
    add("--drop_tau", type=float, default=0.0, help="images in which a sigmoid replaces --drop_rate; < 0: falling")
    add("--drop_middle", type=float, default=0.0, help="images seen in the middle of the sigmoid")

    add = parser.add_argument_group("network").add_argument
    add("--arch", default="navit_b", help="navit_ti, navit_s, navit_b, navit_l")
    add("--patch_size", type=int, default=16, help="side in pixels")
    positions = "sum, product or stack of two tables, Fourier features, or one table resized to the grid of an image"
    add("--positions", default="sum", choices=CHOICES["positions"], help=positions)
    coordinates = "as they are, over the sides of the image, or over its longer side"
    add("--coordinates", default="absolute", choices=CHOICES["coordinates"], help=coordinates)
    add("--max_side", type=int, default=64, help="patches a side: length of the tables")
    add("--norm", default="layernorm", choices=CHOICES["norm"], help="without biases")
    add("--qk_norm", type=bool_flag, default=True, help="normalise queries and keys")
    add("--pool", default="map", choices=("map", "gap"), help="attention pooling, or the mean")
    kinds = ("auto", "mask", "segments", "varlen")
    add("--attention", default="auto", choices=kinds, help="how tokens find those of their image; all are equal")
    add("--compile", action="store_true", help="torch.compile MLPs and heads, not how they attend, for any length")

    add = parser.add_argument_group("optimisation").add_argument
    add("--loss", default="sigmoid", choices=(*LOSSES, "contrastive"), help="of labels, or of captions as labels")
    add("--text_length", type=int, default=64, help="bytes of a caption, with its end")
    add("--chunks", type=int, default=4, help="in which the similarities of the contrastive loss are computed")
    add("--epochs", type=int, default=90, help="passes over the images")
    add("--lr", type=float, default=8e-4, help="peak learning rate")
    add("--weight_decay", type=float, default=0.03, help="of matrices, times the learning rate")
    add("--weight_decay_head", type=float, default=3.0, help="of the classifier")
    add("--warmup_steps", type=int, default=None, help="None: 10,000, or a tenth of the run if that is less")
    add("--cooldown_steps", type=int, default=None, help="None: a tenth of the run")
    add("--clip_grad", type=float, default=1.0, help="cap of the norm of all gradients together")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")

    add = parser.add_argument_group("evaluation").add_argument
    add("--test_freq", type=int, default=1, help="epochs between evaluations")
    add("--test_resolutions", type=float, nargs="+", default=None, help="None: both ends of --resolution; 0: own")

    add = add_run_flags(parser, knn=False)
    add("--output_dir", default=".", help="checkpoints, logs and pictures")
    add("--seed", type=int, default=0, help="of the initial weights, the order of the images and all draws")
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; without ``--data_path`` the defaults are those of the generated images."""
    parser = parser or get_args_parser()
    args = parse_with_embedded_defaults(parser, arguments, EMBEDDED_DATA_DEFAULTS, MINIMUM)
    check_positive(parser, args, "clip_grad")
    low, high = args.resolution
    if not 0 < low <= high:
        parser.error(f"--resolution {low:g} {high:g}: expected two sides in pixels, the smaller one first")
    if low < args.patch_size:
        parser.error(f"--patch_size {args.patch_size} is larger than an image of --resolution {low:g} pixels a side")
    least = {"constant": args.drop_rate, "resolution": max(args.drop_range[1] - 0.04, 0)}.get(args.drop, 0.0)
    longest = round((high / args.patch_size) ** 2 * (1 - (0 if args.drop_tau else least)))
    if longest > args.sequence_length:
        parser.error(
            f"--sequence_length {args.sequence_length}: an image of --resolution {high:g} has {longest} tokens of "
            f"--patch_size {args.patch_size} that are not dropped"
        )
    if args.drop_tau and args.drop not in ("constant", "beta"):
        parser.error(f"--drop_tau is a schedule of --drop_rate, and --drop {args.drop} has none: take constant or beta")
    for flag, rate in (("drop_rate", args.drop_rate), ("drop_max", args.drop_max)):
        if not 0 <= rate < 1:
            parser.error(f"--{flag} {rate} is not in [0, 1)")
    if args.drop == "beta" and not 0 < args.drop_rate < args.drop_max:
        parser.error(f"--drop_rate {args.drop_rate} is no mean of rates between 0 and --drop_max {args.drop_max}")
    args.test_resolutions = sorted(set(args.test_resolutions or args.resolution))
    return args


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, cooldown_steps: int) -> float:
    """Linear warm-up from 0, reciprocal square root, linear cooldown to 0."""
    decay = (1 + max(step - warmup_steps, 0) / max(warmup_steps, 1)) ** -0.5
    return min(1.0, step / max(warmup_steps, 1)) * decay * min(1.0, (total_steps - step) / max(cooldown_steps, 1))


# --- Training ---------------------------------------------------------------------------------------------------------


def train_batches(args: argparse.Namespace, source: ImageSource, bad_images: BadImages) -> PackedBatches:
    """The packed images."""
    lengths = tuple(max(1, round((side / args.patch_size) ** 2)) for side in args.resolution)
    rates = args.drop_rate, args.drop_max, tuple(args.drop_range)
    resolutions = Resolutions(*args.resolution, args.resolution_draw, args.resolution_mean, args.resolution_sample)
    dropping = Dropping(args.drop, *rates, lengths, args.drop_tau, args.drop_middle)
    longest = args.sequence_length, args.max_side
    options = {"seed": args.seed, "bad_images": bad_images, "in_chans": args.in_chans, "flip": args.flip}
    patches = TrainPatches(source, args.patch_size, resolutions, dropping, longest, **options)
    workers = default_num_workers() if args.num_workers is None else args.num_workers
    seen = args.epochs * len(source) if args.drop_tau else None
    batches = PackedBatches(patches, args.sequence_length, args.batch_size, workers, args.max_open, seen)
    known = len(source), batches.checksum
    distributed.check_same_on_all_processes(known, "the training data (number of images, checksum)")
    distributed.print_once(
        f"{source.describe()}: about {batches.tokens:.0f} tokens an image after dropping, "
        f"{args.sequence_length / batches.tokens:.1f} images in a sequence of {args.sequence_length}"
    )
    return batches


def train_navit(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from the start if there is none."""
    run = Run(args, args.amp)

    # images
    train, val = open_images(args, captions=args.loss == "contrastive")
    if train is None or train.classes is None:
        raise ValueError(
            f"--data_path {args.data_path}: no classes or captions; expected a list of image, tab, caption"
        )
    ask_about_classes(train.classes)
    bad_images, bad_val_images = (
        BadImages(len(source), run.output_dir / listed, args.on_bad_image, args.max_bad_fraction)
        for source, listed in ((train, "bad_images.txt"), (val or train, "bad_images_val.txt"))
    )
    batches = train_batches(args, cache_images(train, args.cache), bad_images)
    total_steps = args.epochs * batches.steps_per_epoch
    tell_embedded_defaults(args.data_path, EMBEDDED_DATA_DEFAULTS)

    # network and loss
    options = {"norm": args.norm, "qk_norm": args.qk_norm, "pool": args.pool}
    of_images = {name: getattr(args, name) for name in ("patch_size", "positions", "coordinates", "max_side")}
    run.classes = train.classes if args.loss in LOSSES else None  # captions are none
    of_images["num_classes"] = len(run.classes or ())
    network = build(args.arch, args.in_chans, **of_images, **options).to(run.device)
    if args.attention == "varlen" and run.device.type != "cuda":
        raise ValueError("--attention varlen is one of GPUs: take auto, mask or segments")
    network.attention = args.attention
    whole, texts = network, {}
    if args.loss == "contrastive":
        texts["text"] = build(args.arch, vocabulary=257, max_side=args.text_length, **options).to(run.device)
        whole = ImageText(network, **texts)
        criterion = partial(loss_of_pairs, captions=train.classes, most=args.text_length, chunks=args.chunks)
    else:
        criterion = partial(loss_of_labels, loss=LOSSES[args.loss])
        if args.loss == "sigmoid":
            nn.init.constant_(network.head.bias, -10.0)
    if args.compile:
        for block in (module for module in whole.modules() if isinstance(module, Block)):
            compile_network(block.attn, "heads", dynamic=True)
            compile_network(block.mlp, dynamic=True)
    model = distributed.wrap(whole, run.device)
    groups = decay_groups(whole, NOT_DECAYED, args.weight_decay, args.weight_decay_head)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    warmup = min(10_000, total_steps // 10) if args.warmup_steps is None else args.warmup_steps
    cooldown = total_steps // 10 if args.cooldown_steps is None else args.cooldown_steps
    factor = partial(learning_rate_factor, total_steps=total_steps, warmup_steps=warmup, cooldown_steps=cooldown)

    def look(resolution: float) -> dict[str, Tensor]:
        classifier = Classifier(network, run.precision, **texts, names=val.classes)
        return classify(classifier, val, bad_val_images, resolution, 32, batches.num_workers, None, run.stop_if_asked)

    resolutions = args.test_resolutions if val is not None else ()
    run.resume(batches, total_steps, NETWORK_FLAGS, model=network, **texts, optimizer=optimizer, batches=batches)
    with run:
        if run.is_new:
            evaluate(run, resolutions, look)
        for epoch in run.epochs():
            train_one_epoch(run, model, criterion, batches, optimizer, args.lr, factor, args.clip_grad)
            is_due = (epoch + 1) % args.test_freq == 0 or epoch + 1 == args.epochs
            run.log_epoch(**evaluate(run, resolutions if is_due else (), look), bad_images=bad_images.count())
            run.end_epoch()
    report(run, train, val, batches, look)


def train_one_epoch(
    run: Run,
    model: nn.Module,
    criterion: Callable[[nn.Module, Packed, Tensor], Tensor],
    batches: PackedBatches,
    optimizer: torch.optim.Optimizer,
    peak_lr: float,
    factor: Callable[[int], float],
    clip_grad: float,
) -> None:
    """One epoch of sequences of packed images.

    Args:
        criterion: Maps the network, E packed images and their labels (E,), on the CPU, to the loss.
        factor: Of the learning rate, by step.
    """
    parameters = list(model.parameters())
    for step, batch in run.steps(batches.epoch(run.step_in_epoch)):
        lr = peak_lr * factor(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images = Packed(**batch["images"]).to(run.device)
        labels = batch["labels"]
        optimizer.zero_grad(set_to_none=True)

        with run.precision.autocast():
            loss = criterion(model, images, labels)

        run.backward(loss, optimizer)
        run.update(clip_total_grad_norm_(parameters, clip_grad), optimizer)
        run.end_step(len(labels), {"loss": loss, **batch["packing"]}, {"lr": lr})


def loss_of_labels(model: nn.Module, images: Packed, labels: Tensor, loss: Callable) -> Tensor:
    """The mean over all images of all processes."""
    logits = model(images).float()
    return mean_over_processes(loss(logits, labels.to(logits.device, non_blocking=True)))


def loss_of_pairs(
    model: nn.Module, images: Packed, labels: Tensor, captions: Sequence[str], most: int, chunks: int
) -> Tensor:
    """The contrastive loss of images and their captions, at most so long, of all processes together."""
    texts = pack_texts([captions[label] for label in labels.tolist()], most)
    image, text, temperature = model(images, texts.to(images.patches.device))
    missing = distributed.max_over_processes(len(labels)) - len(labels)  # fake pairs, which do not count
    image, text = (F.pad(x, (0, 0, 0, missing)) for x in (image, text))
    return contrastive_loss(
        image, text, torch.arange(len(image), device=image.device) < len(labels), temperature, chunks
    )


def evaluate(run: Run, resolutions: Sequence[float], look: Callable[[float], dict[str, Tensor]]) -> dict[str, float]:
    """Accuracy at each resolution, of the class or of the caption; ``test_acc1`` is that of the largest."""
    rows = [row for row, _ in measure(resolutions, look)]
    tested = {f"test_{name}_{row['resolution']:g}": row[name] for row in rows for name in ("acc1", "tokens")}
    tested |= {f"test_{name}": row[name] for row in rows[-1:] for name in ("acc1", "loss")}
    if tested:
        run.log_evaluation(**tested)
    return tested


def main() -> None:
    with distributed.clean_exit():
        train_navit(parse_args())


if __name__ == "__main__":
    main()
