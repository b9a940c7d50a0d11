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
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paws import flags
from paws.augmentations import Recipe, choose_recipe
from paws.checkpoints import NETWORK_FLAGS, find_checkpoint, from_official, latest, numbered_checkpoint, to_official
from paws.encoder import build_encoder
from paws.evaluation import SoftNearestNeighbours, build_snn_monitor
from paws.hub import load_backbone_into
from paws.losses import paws_loss, sharpen, soft_nearest_neighbours
from paws.optimisation import LARS, lr_schedule, parameter_groups
from paws.pseudo_labels import save_pseudo_labels
from paws.report import collapse_monitor, save_pictures, summary
from paws.training_data import open_training_data
from shared import distributed
from shared.images.decode import ImageError
from shared.multicrop import normalize_views
from shared.networks.batchnorm import synchronize_batchnorm
from shared.optimisation.optim import clip_grad_norm_per_tensor_
from shared.run.flags import bool_flag, tell_embedded_defaults
from shared.run.health import feature_spread, rank_me
from shared.run.run import Run

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
    parser = flags.new_parser(__doc__)
    flags.add_view_flags(flags.add_label_flags(parser))
    add = flags.add_support_flags(parser)
    add("--me_max", type=bool_flag, default=True, help="keep the classes of the pseudo-labels diverse")
    add("--sharpen", type=float, default=0.25, help="temperature of the targets' sharpening")
    flags.add_network_flags(parser)
    flags.add_optimisation_flags(parser)
    flags.add_run_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; without images the defaults are those of the embedded digits."""
    parser = parser or get_args_parser()
    args = flags.parse_with_embedded_defaults(parser, arguments, EMBEDDED_DATA_DEFAULTS)
    if args.output_dim < 4:
        parser.error(f"--output_dim {args.output_dim} is less than 4")
    return args


def train_paws(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from scratch if there is none."""
    run = Run(args, args.amp if args.use_fp16 else "fp32", latest(args))
    device = run.device
    recipe = choose_recipe(args.dataset, args.normalize, args.image_size, args.small_image_size)
    data = open_training_data(args, recipe, run.output_dir, device)
    tell_embedded_defaults(args.data_path, EMBEDDED_DATA_DEFAULTS)

    # encoder, optimiser, learning rate of every step, labels of the supports
    encoder = build_encoder(args.model_name, args.output_dim, args.use_pred_head, recipe.large[0], args.in_chans)
    if args.pretrained is not None:
        load_backbone_into(encoder, args.model_name, args.pretrained, args.allow_partial)
    encoder = distributed.wrap(synchronize_batchnorm(encoder, device).to(device), device)
    optimizer = LARS(parameter_groups(encoder, args.weight_decay), momentum=args.momentum, nesterov=args.nesterov)
    warmup_steps, steps = args.warmup * data.steps_per_epoch, args.epochs * data.steps_per_epoch
    rates = lr_schedule(args.start_lr, args.lr, args.final_lr, warmup_steps, steps)
    labels = data.support_labels.to(device)

    # checkpoints under the names of the official ones, monitoring
    layout = {"to_official": to_official, "from_official": from_official, "scheduled": ("lr",)}
    checkpoint = find_checkpoint(run.path, args.read_checkpoint)
    run.resume(data, steps, NETWORK_FLAGS, checkpoint=checkpoint, **layout, encoder=encoder, opt=optimizer)
    run.health = collapse_monitor(labels.shape[1], steps)
    classifier = SoftNearestNeighbours(data.images, recipe, args.temperature, device, data.unlabelled.num_workers)
    evaluation = build_snn_monitor(args, classifier, args.on_bad_image)

    with run:
        if run.is_new and evaluation.is_due(-1):
            run.log_evaluation(snn_top1=evaluation.run(distributed.unwrap(encoder), run.stop_if_asked))
        for epoch in run.epochs():
            data.set_epoch(epoch, run.step_in_epoch)
            train_one_epoch(
                encoder,
                data,
                optimizer,
                rates,
                labels,
                recipe,
                run,
                temperature=args.temperature,
                sharpen_temperature=args.sharpen,
                me_max=args.me_max,
            )
            if evaluation.is_due(epoch):
                run.log_evaluation(snn_top1=evaluation.run(distributed.unwrap(encoder), run.stop_if_asked))
            run.log_epoch(bad_images=data.dataset.bad_images.count())
            run.end_epoch(keep_as=numbered_checkpoint(args, epoch))
    try:
        lines, pictures = save_pseudo_labels(distributed.unwrap(encoder), classifier, run.output_dir, args.pictures)
    except ImageError as error:  # as after self-training, when all readable images have a label
        lines, pictures = [f"no pseudo-labels: {error}"], []
    if distributed.is_main_process():
        pictures += save_pictures(data.dataset, run.output_dir) if args.pictures else []
        print(summary(args, run, evaluation, lines, pictures))


def train_one_epoch(
    encoder: nn.Module,
    batches: Iterable,
    optimizer: torch.optim.Optimizer,
    rates: np.ndarray,
    labels: Tensor,
    recipe: Recipe,
    run: Run,
    *,
    temperature: float,
    sharpen_temperature: float,
    me_max: bool,
) -> None:
    """One epoch of Algorithm 1.

    ``batches`` yields two batches (views, labels, indices): of unlabelled images, the two large views first, then the
    small ones, and of supports; all crop-major: uint8 images, or float tensors that are normalised already.
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

        run.backward(loss, optimizer)
        run.update(clip_grad_norm_per_tensor_(parameters, max_norm=0), optimizer)

        health = None
        if run.logs_this_step:
            health = prediction_health(z[num_supports:], z[:num_supports], labels, temperature, sharpen_temperature)
        run.end_step(batch_size, {"loss": loss, "ploss": ploss, "me_max": rloss, "lr": rates[step]}, health)


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
