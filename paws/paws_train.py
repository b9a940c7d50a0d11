"""Semi-supervised learning of visual features by non-parametrically predicting view assignments with support samples.

Assran et al., "Semi-Supervised Learning of Visual Features by Non-Parametrically Predicting View Assignments with
Support Samples", ICCV 2021 (PAWS).

    python main.py                                       # embedded digits, 4 labels of each, a minute or two on a CPU
    python main.py --data_path pictures --labels labels.csv --fname configs/paws/own_images.yaml --output_dir run
    torchrun --nproc_per_node=8 main.py --fname configs/paws/imgnt_train.yaml --data_path /path/to/imagenet/train \\
        --subset_path imagenet_subsets --output_dir /path/to/run

Every view of an unlabelled image gets a pseudo-label: the vote of a few labelled images, the supports, weighted with
their similarity. The encoder learns that two views of an image get the same pseudo-label, and a certain one. Ends with
the pseudo-label of every image in ``pseudo_labels.csv``. Running the same command again resumes the run.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paws import training_flags
from paws.augmentations import choose_recipe
from paws.collapse import CollapseMonitor
from paws.losses import paws_loss, sharpen, soft_nearest_neighbours
from paws.pseudo_labels import Written, save_pseudo_labels
from paws.report import save_pictures, summary
from paws.training_loop import new_guard
from paws.training_setup import (
    Resumable,
    build_monitor,
    build_optimizer,
    build_wrapped_encoder,
    find_checkpoint,
    labels_of_supports,
    latest,
    numbered_checkpoint,
    open_training_data,
)
from shared import distributed
from shared.images.decode import ImageError
from shared.multicrop import normalize_views
from shared.optimisation.optim import clip_grad_norm_per_tensor_, step_unless_not_finite
from shared.optimisation.precision import Precision
from shared.run import randomness
from shared.run.checkpoint import Checkpointer, is_at_start
from shared.run.flags import bool_flag
from shared.run.health import feature_spread, rank_me
from shared.run.log import RunLog
from shared.run.not_finite import FiniteGuard
from shared.run.start import start_run

# What replaces the defaults when no images are given: 8x8 pixel digits need no ResNet-50 at 224 pixels. The learning
# rate rises slowly, or the network is taught by its first pseudo-labels, of which most are wrong.
EMBEDDED_DATA_DEFAULTS = {
    "labels_per_class": 4,
    "dataset": "digits",
    "color_jitter_strength": 0.5,
    "multicrop": 2,
    "supervised_imgs_per_class": 4,
    "supervised_views": 4,
    "unsupervised_batch_size": 64,
    "model_name": "wide_resnet10w1",
    "output_dim": 64,
    "epochs": 20,
    "lr": 0.8,
    "start_lr": 0.1,
    "final_lr": 0.008,
    "warmup": 4,
    "output_dir": "runs/digits",
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = training_flags.new_parser(__doc__)
    training_flags.add_view_flags(training_flags.add_label_flags(parser))
    add = training_flags.add_support_flags(parser)
    add("--me_max", type=bool_flag, default=True, help="keep the classes of the pseudo-labels diverse")
    add("--sharpen", type=float, default=0.25, help="temperature of the targets' sharpening")
    training_flags.add_network_flags(parser)
    training_flags.add_optimisation_flags(parser)
    training_flags.add_run_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; without images the defaults are those of the embedded digits.

    Args:
        arguments: The command line's own by default.
        parser: That of :func:`get_args_parser` with further flags, for programs that have them.
    """
    parser = parser or get_args_parser()
    args = training_flags.parse_with_embedded_defaults(parser, arguments, EMBEDDED_DATA_DEFAULTS)
    if args.output_dim < 4:
        parser.error(f"--output_dim {args.output_dim} is less than 4")
    return args


def train_paws(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from scratch if there is none."""
    device, output_dir = start_run(args)
    precision = Precision(args.amp if args.use_fp16 else "fp32", device)
    recipe = choose_recipe(args.dataset, args.normalize, args.image_size, args.small_image_size)
    data = open_training_data(args, recipe, output_dir, device)
    if args.data_path is None:
        names = " ".join(f"--{name}" for name in EMBEDDED_DATA_DEFAULTS)
        distributed.print_once(f"without images these flags have defaults for the embedded digits: {names}")
    steps_per_epoch = data.steps_per_epoch

    # encoder, optimiser, schedule, labels of the supports
    encoder = build_wrapped_encoder(args, recipe, device)
    optimizer, rates = build_optimizer(args, encoder, steps_per_epoch)
    labels = labels_of_supports(args, device)

    # resume
    checkpoint = find_checkpoint(args, output_dir)
    log = RunLog(output_dir, len(rates), args.log_freq, args.tensorboard, resumed=bool(checkpoint))
    training = Resumable(args, data, encoder, optimizer, precision, log)
    first_epoch, first_step = (0, 0) if checkpoint is None else training.load(checkpoint)
    training.guard = guard = new_guard(encoder, output_dir, args.max_skipped_steps, device, checkpoint)
    monitor = CollapseMonitor(labels.shape[1], patience_steps=len(rates) // 4)
    evaluation = build_monitor(args, data, recipe, output_dir, device)

    # epochs
    with Checkpointer(
        output_dir / latest(args), training.state, args.saveckp_steps, args.saveckp_minutes, guard.is_good
    ) as checkpointer:
        if is_at_start(checkpoint):
            training.evaluate(evaluation, checkpointer, epoch=-1)
        for epoch in range(first_epoch, args.epochs):
            data.set_epoch(epoch, first_step)
            train_one_epoch(
                encoder,
                data,
                optimizer,
                rates,
                labels,
                temperature=args.temperature,
                sharpen_temperature=args.sharpen,
                me_max=args.me_max,
                mean=recipe.mean,
                std=recipe.std,
                epoch=epoch,
                first_step=first_step,
                steps_per_epoch=steps_per_epoch,
                seed=args.seed,
                precision=precision,
                log=log,
                guard=guard,
                checkpointer=checkpointer,
                monitor=monitor,
            )
            first_step = 0
            training.evaluate(evaluation, checkpointer, epoch)
            log.end_epoch(epoch, bad_images=data.bad_images.count())
            checkpointer.after_epoch(epoch, keep_as=numbered_checkpoint(args, epoch))
    log.close()
    try:
        written = save_pseudo_labels(
            distributed.unwrap(encoder),
            data.images,
            recipe,
            args.temperature,
            output_dir,
            device,
            args.pictures,
            num_workers=data.num_workers,
        )
    except ImageError as error:  # as after self-training, when all readable images have a label
        written = Written(None, [f"no pseudo-labels: {error}"])
    if distributed.is_main_process():
        pictures = written.pictures + (save_pictures(data.dataset, output_dir) if args.pictures else [])
        print(summary(args, output_dir, evaluation, written, pictures, list(monitor.warnings.values())))


def train_one_epoch(
    encoder: nn.Module,
    batches: Iterable,
    optimizer: torch.optim.Optimizer,
    rates: np.ndarray,
    labels: Tensor,
    *,
    temperature: float,
    sharpen_temperature: float,
    me_max: bool,
    mean: Sequence[float],
    std: Sequence[float],
    epoch: int,
    first_step: int,
    steps_per_epoch: int,
    seed: int,
    precision: Precision,
    log: RunLog,
    guard: FiniteGuard,
    checkpointer: Checkpointer,
    monitor: CollapseMonitor | None = None,
) -> None:
    """One epoch (from its step ``first_step`` on) of Algorithm 1.

    ``batches`` yields two batches (views, labels, indices): of unlabelled images, the two large views first, then the
    small ones, and of supports; all crop-major: uint8 images, or float tensors that are normalised already.
    """
    parameters = list(encoder.parameters())
    encoder.train()
    start = epoch * steps_per_epoch + first_step
    for step, (unlabelled, supports) in enumerate(log.batches(batches), start=start):
        randomness.seed_step(seed, step, distributed.get_rank())
        for group in optimizer.param_groups:
            group["lr"] = float(rates[step])
        optimizer.zero_grad(set_to_none=True)  # before the activations: the two never need memory at once
        (support_views,), image_views = (
            normalize_views(loaded, precision.device, mean, std) for loaded in (supports[0], unlabelled[0])
        )
        views = [support_views, *image_views]
        num_supports, batch_size = len(support_views), len(unlabelled[2])

        # supports and large views are one batch for the batch norms
        with precision.autocast():
            h, z = encoder(views)
        h, z = h.float().detach(), z.float()
        large_h = h[num_supports : num_supports + 2 * batch_size]
        ploss, rloss = paws_loss(
            anchors=z[num_supports:],
            anchor_supports=z[:num_supports],
            targets=torch.cat([large_h[batch_size:], large_h[:batch_size]]),  # each view learns from the other one
            target_supports=h[:num_supports],
            labels=labels,
            temperature=temperature,
            sharpen_temperature=sharpen_temperature,
            me_max=me_max,
        )
        loss = ploss + rloss

        precision.backward(loss, optimizer)
        skipped = step_unless_not_finite(optimizer, clip_grad_norm_per_tensor_(parameters, max_norm=0))
        precision.update()
        guard.count(skipped)

        averages = {"loss": loss, "ploss": ploss, "me_max": rloss, "lr": rates[step], "skipped": skipped}
        health = {}
        if log.is_due(step):
            health = prediction_health(z[num_supports:], z[:num_supports], labels, temperature, sharpen_temperature)
        line = log.step(step, epoch, batch_size, averages, **health)
        if line is not None and monitor is not None and (problem := monitor.check(line)):
            log.say(problem)
        if line is not None and guard.too_many():
            randomness.seed_step(seed, step, distributed.get_rank())
            batch = {"supports": supports[0], "views": unlabelled[0], "indices": unlabelled[2]}
            with precision.autocast():
                guard.stop({**batch, "step": step, "epoch": epoch}, views, {"encoder": views}, loss)
        checkpointer.after_step(epoch, step + 1 - epoch * steps_per_epoch)


@torch.no_grad()
def prediction_health(
    anchors: Tensor, supports: Tensor, labels: Tensor, temperature: float, sharpen_temperature: float
) -> dict[str, Tensor | float]:
    """What shows a collapse: a mean prediction of few classes, uncertain predictions, equal representations."""
    predictions = sharpen(
        soft_nearest_neighbours(anchors, distributed.all_gather(supports), labels, temperature), sharpen_temperature
    )
    return {
        "certainty": predictions.amax(dim=1).mean(),
        "mean_entropy": torch.special.entr(predictions.mean(dim=0)).sum(),
        "ln_k": math.log(labels.shape[1]),
        "feature_spread": feature_spread(anchors),
        "rank_me": rank_me(anchors),
    }


def main() -> None:
    with distributed.clean_exit():
        train_paws(parse_args())


if __name__ == "__main__":
    main()
