"""SuNCEt: a supervised contrastive loss on a few labelled images beside SimCLR on all of them.

Assran et al., "Supervision Accelerates Pre-training in Contrastive Semi-Supervised Learning of Visual
Representations", 2020.

    python suncet_train.py                               # embedded materials, 4 labels of each, a minute on a CPU
    torchrun --nproc_per_node=8 main.py --sel suncet_train --fname configs/suncet/imgnt_train.yaml \\
        --data_path /path/to/imagenet/train --subset_path imagenet_subsets --output_dir /path/to/run

Every labelled image has to find those of its class among the labelled images of the batch, every unlabelled one its
other view. Running the same command again resumes the run.
"""

import argparse
import sys
from collections.abc import Iterable
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
from paws.losses import simclr_loss, suncet_loss
from paws.optimisation import LARS, lr_schedule, parameter_groups
from paws.pretraining import new_encoder, numbered_checkpoint, open_training_data, resume
from paws.report import report
from shared import distributed
from shared.multicrop import normalize_views
from shared.optimisation.optim import clip_grad_norm_per_tensor_
from shared.run.run import Run

EMBEDDED_DATA_DEFAULTS = {
    "labels_per_class": 4,
    "dataset": "cifar10",  # images of the same size
    "color_jitter_strength": 0.5,
    "unsupervised_batch_size": 64,
    "model_name": "wide_resnet10w1",
    "output_dim": 64,
    "epochs": 8,
    "supervised_epochs": 8,
    "lr": 1.6,
    "start_lr": 0.4,
    "final_lr": 0.016,
    "warmup": 1,
    "output_dir": "runs/materials-suncet",
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.pretraining_parser(__doc__, write_tag="suncet")
    add = parser.add_argument_group("data").add_argument
    add("--multicrop", type=int, default=0, choices=(0,), help="SuNCEt has no small views")
    add("--label_smoothing", type=float, default=0.0, help="of the labels of the supports")
    add = parser.add_argument_group("criterion").add_argument
    add("--supervised_epochs", type=int, default=100, help="epochs with the loss of the labelled images")
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; without images the defaults are those of the embedded materials."""
    return flags.parse_with_embedded_defaults(parser or get_args_parser(), arguments, EMBEDDED_DATA_DEFAULTS)


def train_suncet(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from scratch if there is none."""
    run = Run(args, args.amp, f"{args.write_tag}-latest.pth.tar")
    recipe = choose_recipe(args.dataset, args.normalize, args.image_size)
    data = open_training_data(args, recipe, run.output_dir, run.device)

    encoder = new_encoder(args, recipe, run.device)
    optimizer = LARS(parameter_groups(encoder, args.weight_decay), momentum=args.momentum, nesterov=args.nesterov)
    rates = lr_schedule(args.start_lr, args.lr, args.final_lr, args.warmup, args.epochs, data.steps_per_epoch)

    resume(run, data, len(rates), args.read_checkpoint, encoder, optimizer)
    classifier = SoftNearestNeighbours(data.images, recipe, args.temperature, run.device, args.num_workers)
    evaluation = build_snn_monitor(args, classifier)
    evaluation.measure_without_labels(run, encoder)

    with run:
        if run.is_new:
            evaluation.evaluate(-1, encoder, run)
        for epoch in run.epochs():
            data.set_epoch(epoch, run.step_in_epoch)
            labels = data.support_labels if epoch < args.supervised_epochs else None
            train_one_epoch(encoder, data, labels, optimizer, rates, recipe, run, args.temperature)
            evaluation.evaluate(epoch, encoder, run)
            run.log_epoch(bad_images=data.dataset.bad_images.count())
            run.end_epoch(keep_as=numbered_checkpoint(args, epoch))
    report(run, data.dataset, evaluation, method="SuNCEt")


def train_one_epoch(
    encoder: nn.Module,
    batches: Iterable,
    labels: Tensor | None,
    optimizer: torch.optim.Optimizer,
    rates: np.ndarray,
    recipe: Recipe,
    run: Run,
    temperature: float,
) -> None:
    """One epoch: SimCLR on two views of unlabelled images plus SuNCEt on labelled ones, from one pass of all of them.

    Args:
        batches: As of :func:`paws.paws_train.train_one_epoch`.
        labels: Of the supports; None: SimCLR alone.
    """
    parameters = list(encoder.parameters())
    encoder.train()
    for step, ((unlabelled, _, indices), (supports, *_)) in run.steps(batches):
        for group in optimizer.param_groups:
            group["lr"] = float(rates[step])
        optimizer.zero_grad(set_to_none=True)
        views = [normalize_views(loaded, run.device, recipe.mean, recipe.std)[0] for loaded in (unlabelled, supports)]

        with run.precision.autocast():
            _, z = encoder(views)
        images, labelled = z.float().split([len(view) for view in views])
        simclr = simclr_loss(images, temperature)
        # without a part in the loss the supports still belong to the pass, whose batch norms see them
        suncet = 0.0 * labelled.sum() if labels is None else suncet_loss(labelled, labels, temperature)
        loss = simclr + suncet

        run.backward(loss, optimizer)
        run.update(clip_grad_norm_per_tensor_(parameters, max_norm=0), optimizer)
        run.end_step(len(indices), {"loss": loss, "simclr": simclr, "suncet": suncet, "lr": rates[step]})


def main() -> None:
    distributed.run_script(train_suncet, parse_args)


if __name__ == "__main__":
    main()
