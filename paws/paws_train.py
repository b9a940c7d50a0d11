"""Semi-supervised learning of visual features by non-parametrically predicting view assignments with support samples.

Assran et al., "Semi-Supervised Learning of Visual Features by Non-Parametrically Predicting View Assignments with
Support Samples", ICCV 2021 (PAWS).

    python main.py                                       # embedded materials, 4 labels of each, minutes on a CPU
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
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
from torch import Tensor, nn

from paws import flags
from paws.augmentations import Recipe, choose_recipe
from paws.evaluation import SoftNearestNeighbours, build_snn_monitor
from paws.losses import paws_loss
from paws.optimisation import LARS, lr_schedule, parameter_groups
from paws.pretraining import new_encoder, numbered_checkpoint, open_training_data, resume
from paws.pseudo_labels import save_pseudo_labels
from paws.report import health_rules, report
from shared import distributed
from shared.images.decode import ImageError
from shared.multicrop import normalize_views
from shared.optimisation.optim import clip_grad_norm_per_tensor_
from shared.run.flags import add_own_images_flags, bool_flag, tell_embedded_defaults
from shared.run.health import HealthMonitor, feature_spread, rank_me
from shared.run.run import Run

# What replaces the defaults when no images are given: images of 32 pixels need no ResNet-50 at 224 pixels. The learning
# rate rises slowly, or the network is taught by its first pseudo-labels, of which most are wrong.
EMBEDDED_DATA_DEFAULTS = {
    "labels_per_class": 4,
    "dataset": "cifar10",  # images of the same size
    "color_jitter_strength": 0.5,
    "multicrop": 2,
    "supervised_views": 4,
    "unsupervised_batch_size": 64,
    "model_name": "wide_resnet10w1",
    "output_dim": 64,
    "epochs": 8,
    "lr": 0.8,
    "start_lr": 0.1,
    "final_lr": 0.008,
    "warmup": 2,
    "output_dir": "runs/materials",
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.pretraining_parser(__doc__, write_tag="paws")
    add_own_images_flags(parser, __file__, "paws/own_images.yaml")
    add = parser.add_argument_group("criterion").add_argument
    add("--me_max", type=bool_flag, default=True, help="keep the classes of the pseudo-labels diverse")
    add("--sharpen", type=float, default=0.25, help="temperature of the targets' sharpening")
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; without images the defaults are those of the embedded materials."""
    parser = parser or get_args_parser()
    args = flags.parse_with_embedded_defaults(parser, arguments, EMBEDDED_DATA_DEFAULTS)
    if args.output_dim < 4:
        parser.error(f"--output_dim {args.output_dim} is less than 4")
    return args


def train_paws(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from scratch if there is none."""
    run = Run(args, args.amp, f"{args.write_tag}-latest.pth.tar")
    recipe = choose_recipe(args.dataset, args.normalize, args.image_size, args.small_image_size)
    data = open_training_data(args, recipe, run.output_dir, run.device)
    tell_embedded_defaults(args.data_path, EMBEDDED_DATA_DEFAULTS)

    # encoder, loss, optimiser, learning rate of every step
    encoder = new_encoder(args, recipe, run.device)
    temperatures = {"temperature": args.temperature, "sharpen_temperature": args.sharpen}
    criterion = partial(paws_loss, labels=data.support_labels, **temperatures, me_max=args.me_max)
    optimizer = LARS(parameter_groups(encoder, args.weight_decay), momentum=args.momentum, nesterov=args.nesterov)
    rates = lr_schedule(args.start_lr, args.lr, args.final_lr, args.warmup, args.epochs, data.steps_per_epoch)

    # checkpoints under the names of the official ones, monitoring
    resume(run, data, len(rates), args.read_checkpoint, encoder, optimizer)
    run.health = HealthMonitor(health_rules(data.support_labels.shape[1], len(rates)))
    classifier = SoftNearestNeighbours(data.images, recipe, args.temperature, run.device, args.num_workers)
    evaluation = build_snn_monitor(args, classifier)
    evaluation.measure_without_labels(run, encoder)

    with run:
        if run.is_new:
            evaluation.evaluate(-1, encoder, run)
        for epoch in run.epochs():
            data.set_epoch(epoch, run.step_in_epoch)
            train_one_epoch(encoder, data, criterion, optimizer, rates, recipe, run)
            evaluation.evaluate(epoch, encoder, run)
            run.log_epoch(bad_images=data.dataset.bad_images.count())
            run.end_epoch(keep_as=numbered_checkpoint(args, epoch))
    try:
        lines, pseudo_labels = save_pseudo_labels(distributed.unwrap(encoder), classifier, run.output_dir)
    except ImageError as error:  # as after self-training, when all readable images have a label
        lines, pseudo_labels = [f"no pseudo-labels: {error}"], None
    report(run, data.dataset, evaluation, lines, pseudo_labels)


def train_one_epoch(
    encoder: nn.Module,
    batches: Iterable,
    criterion: Callable[..., tuple[Tensor, Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    rates: np.ndarray,
    recipe: Recipe,
    run: Run,
) -> None:
    """One epoch of Algorithm 1.

    Args:
        batches: Yields two batches (views, labels, indices): of unlabelled images, the two large views first, then the
            small ones, and of supports; all crop-major: uint8 images, or float tensors that are normalised already.
        criterion: :func:`paws.losses.paws_loss` with the labels of the supports.
    """
    parameters = list(encoder.parameters())
    encoder.train()
    for step, (unlabelled, supports) in run.steps(batches):
        for group in optimizer.param_groups:
            group["lr"] = float(rates[step])
        optimizer.zero_grad(set_to_none=True)  # before the activations: the two never need memory at once
        (support_views,), image_views = (
            normalize_views(loaded, run.device, recipe.mean, recipe.std) for loaded in (supports[0], unlabelled[0])
        )
        num_supports, batch_size = len(support_views), len(unlabelled[2])

        # supports and large views are one batch for the batch norms
        with run.precision.autocast():
            h, z = encoder([support_views, *image_views])
        h, z = h.float().detach(), z.float()
        large_h = h[num_supports : num_supports + 2 * batch_size]
        ploss, rloss, predictions = criterion(
            anchors=z[num_supports:],
            anchor_supports=z[:num_supports],
            targets=torch.cat([large_h[batch_size:], large_h[:batch_size]]),  # each view learns from the other one
            target_supports=h[:num_supports],
        )
        loss = ploss + rloss

        run.backward(loss, optimizer)
        run.update(clip_grad_norm_per_tensor_(parameters, max_norm=0), optimizer)
        health = prediction_health(predictions.detach(), z[num_supports:].detach()) if run.logs_this_step else None
        run.end_step(batch_size, {"loss": loss, "ploss": ploss, "me_max": rloss, "lr": rates[step]}, health)


def prediction_health(predictions: Tensor, anchors: Tensor) -> dict[str, Tensor | float]:
    """What shows a collapse: a mean prediction of few classes, uncertain predictions, equal representations."""
    return {
        "certainty": predictions.amax(dim=1).mean(),
        "mean_entropy": torch.special.entr(predictions.mean(dim=0)).sum(),
        "ln_k": math.log(predictions.shape[1]),
        "feature_spread": feature_spread(anchors),
        "rank_me": rank_me(anchors),
    }


def main() -> None:
    distributed.run_script(train_paws, parse_args)


if __name__ == "__main__":
    main()
