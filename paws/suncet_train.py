"""SuNCEt: a supervised contrastive loss on a few labelled images beside SimCLR on all of them.

Assran et al., "Supervision Accelerates Pre-training in Contrastive Semi-Supervised Learning of Visual
Representations", 2020.

    python suncet_train.py                               # embedded digits, 4 labels of each, a minute on a CPU
    torchrun --nproc_per_node=8 main.py --sel suncet_train --fname configs/suncet/imgnt_train.yaml \\
        --data_path /path/to/imagenet/train --subset_path imagenet_subsets --output_dir /path/to/run

Every labelled image has to find those of its class among the labelled images of the batch, every unlabelled one its
other view. Running the same command again resumes the run.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from torch import Tensor, nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paws import training_flags
from paws.augmentations import Recipe, choose_recipe
from paws.losses import simclr_loss, suncet_loss
from paws.training_loop import Loop, StepLoss, new_guard
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
from shared.multicrop import normalize_views
from shared.optimisation.precision import Precision
from shared.run.checkpoint import Checkpointer, is_at_start
from shared.run.log import RunLog
from shared.run.start import start_run

EMBEDDED_DATA_DEFAULTS = {
    "labels_per_class": 4,
    "dataset": "digits",
    "color_jitter_strength": 0.5,
    "supervised_imgs_per_class": 4,
    "unsupervised_batch_size": 64,
    "model_name": "wide_resnet10w1",
    "output_dim": 64,
    "epochs": 8,
    "supervised_epochs": 8,
    "lr": 1.6,
    "start_lr": 0.4,
    "final_lr": 0.016,
    "warmup": 1,
    "output_dir": "runs/digits-suncet",
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = training_flags.new_parser(__doc__)
    add = training_flags.add_label_flags(parser)
    training_flags.add_view_flags(add)
    add("--multicrop", type=int, default=0, choices=(0,), help="SuNCEt has no small views")
    add("--label_smoothing", type=float, default=0.0, help="of the labels of the supports")
    add = training_flags.add_support_flags(parser)
    add("--supervised_epochs", type=int, default=100, help="epochs with the loss of the labelled images")
    training_flags.add_network_flags(parser)
    training_flags.add_optimisation_flags(parser)
    training_flags.add_run_flags(parser)
    training_flags.add_output_flags(parser, write_tag="suncet")
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; without images the defaults are those of the embedded digits."""
    return training_flags.parse_with_embedded_defaults(parser or get_args_parser(), arguments, EMBEDDED_DATA_DEFAULTS)


def train_suncet(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from scratch if there is none."""
    device, output_dir = start_run(args)
    precision = Precision(args.amp if args.use_fp16 else "fp32", device)
    recipe = choose_recipe(args.dataset, args.normalize, args.image_size)
    data = open_training_data(args, recipe, output_dir, device)
    steps_per_epoch = data.steps_per_epoch

    encoder = build_wrapped_encoder(args, recipe, device)
    optimizer, rates = build_optimizer(args, encoder, steps_per_epoch)
    labels = labels_of_supports(args, device)
    step_loss = partial(
        contrast,
        encoder,
        labels,
        temperature=args.temperature,
        supervised_epochs=args.supervised_epochs,
        recipe=recipe,
        precision=precision,
    )

    checkpoint = find_checkpoint(args, output_dir)
    log = RunLog(output_dir, len(rates), args.log_freq, args.tensorboard, resumed=bool(checkpoint))
    training = Resumable(args, data, encoder, optimizer, precision, log)
    first_epoch, first_step = (0, 0) if checkpoint is None else training.load(checkpoint)
    training.guard = guard = new_guard(encoder, output_dir, args.max_skipped_steps, device, checkpoint)
    evaluation = build_monitor(args, data, recipe, output_dir, device)
    with Checkpointer(
        output_dir / latest(args), training.state, args.saveckp_steps, args.saveckp_minutes, guard.is_good
    ) as checkpointer:
        loop = Loop(encoder, optimizer, rates, steps_per_epoch, args.seed, precision, log, guard, checkpointer)
        if is_at_start(checkpoint):
            training.evaluate(evaluation, checkpointer, epoch=-1)
        for epoch in range(first_epoch, args.epochs):
            data.set_epoch(epoch, first_step)
            encoder.train()
            loop.epoch(data, step_loss, epoch, first_step)
            first_step = 0
            training.evaluate(evaluation, checkpointer, epoch)
            log.end_epoch(epoch, bad_images=data.bad_images.count())
            checkpointer.after_epoch(epoch, keep_as=numbered_checkpoint(args, epoch))
    log.close()


def contrast(
    encoder: nn.Module,
    labels: Tensor,
    batches: tuple,
    epoch: int,
    *,
    temperature: float,
    supervised_epochs: int,
    recipe: Recipe,
    precision: Precision,
) -> StepLoss:
    """SimCLR on two views of unlabelled images plus SuNCEt on labelled ones, from one pass of all of them."""
    (unlabelled, _, indices), (supports, *_) = batches
    views = [normalize_views(loaded, precision.device, recipe.mean, recipe.std)[0] for loaded in (unlabelled, supports)]
    with precision.autocast():
        _, z = encoder(views)
    images, labelled = z.float().split([len(view) for view in views])
    simclr = simclr_loss(images, temperature)
    # without a part in the loss the supports still belong to the pass, whose batch norms see them
    suncet = suncet_loss(labelled, labels, temperature) if epoch < supervised_epochs else 0.0 * labelled.sum()
    return StepLoss(simclr + suncet, {"simclr": simclr, "suncet": suncet}, views, len(indices))


def main() -> None:
    with distributed.clean_exit():
        train_suncet(parse_args())


if __name__ == "__main__":
    main()
