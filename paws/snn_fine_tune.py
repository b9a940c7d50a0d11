"""Fine-tune an encoder for classification by soft nearest neighbours, with the SuNCEt loss on the labelled images.

    python snn_fine_tune.py                                  # embedded materials, weights of the run in runs/materials
    python snn_fine_tune.py --fname configs/paws/cifar10_snn.yaml --data_path cifar10 --subset_path cifar10_subsets \\
        --pretrained /path/to/run/paws-latest.pth.tar --output_dir /path/to/fine-tuned

Backbone and heads learn, batch norms keep the statistics of the training. The result is the accuracy after the last
epoch. Running the same command again resumes.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from torch import Tensor, nn

from paws import flags
from paws.augmentations import support_views
from paws.evaluation import SoftNearestNeighbours, build_snn_monitor
from paws.fine_tuning import labelled_batches, resume, train_one_epoch
from paws.hub import load_encoder
from paws.labels import PartlyLabelled, open_images
from paws.losses import suncet_loss, support_labels
from paws.optimisation import LARS, lr_schedule, parameter_groups
from paws.support_sampler import MOST_SUPPORTS, SupportSampler
from shared import distributed
from shared.networks.backbones import input_channels
from shared.run.flags import bool_flag
from shared.run.run import Run

EMBEDDED_DATA_DEFAULTS = flags.ON_EMBEDDED | {
    "color_jitter_strength": 0.5,
    "output_dir": "runs/materials/snn-tuned",
}
# A run that is resumed must have these as they were.
RUN_FLAGS = ("model_name", "lr", "epochs", "supervised_batch_size", "supervised_views", "seed")


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.new_parser(__doc__)
    add = flags.add_label_flags(parser, dataset=None)
    add("--color_jitter_strength", type=float, default=0.5, help="of the views")
    add("--label_smoothing", type=float, default=0.0, help="of the labels")
    add = parser.add_argument_group("criterion").add_argument
    add("--classes_per_batch", type=int, default=None, help="classes of a batch; by default all")
    size = "images of a class in a batch; None: as many as the class with the fewest labels allows, at most 16"
    add("--supervised_batch_size", type=int, default=None, help=size)
    add("--supervised_views", type=int, default=2, help="views of every image")
    add("--temperature", type=float, default=0.1, help="of the softmax over similarities")
    add = flags.add_fine_tuning_flags(parser, model_name="wide_resnet28w2", write_tag="paws-fine-tune-SNN")
    add("--output_dim", type=int, default=None, help="ignored: the file says it")
    add("--use_pred_head", type=bool_flag, default=False, help="compare the outputs of the prediction head")
    add = flags.add_optimisation_flags(parser)
    add("--use_lars", type=bool_flag, default=True, help="adapt the learning rate layer by layer")
    parser.set_defaults(epochs=30, lr=0.1, start_lr=0.1, final_lr=0.01, warmup=0, weight_decay=0.0)
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; without images the defaults are those of the embedded materials."""
    parser = parser or get_args_parser()
    return flags.parse_with_embedded_defaults(parser, arguments, EMBEDDED_DATA_DEFAULTS, flags.WEIGHTS)


def snn_fine_tune(args: argparse.Namespace) -> float | None:
    """Fine-tune and classify; top-1 in percent after the last epoch, None where nothing can be classified."""
    run = Run(args, args.amp, f"{args.write_tag}.pth.tar", owns_folder=False)
    device = run.device
    recipe = flags.recipe_of_run(args)

    # images, encoder
    images = open_images(args)
    classifier = SoftNearestNeighbours(images, recipe, args.temperature, device, args.num_workers, args.use_pred_head)
    evaluation = build_snn_monitor(args, classifier)
    encoder = load_encoder(args.model_name, args.pretrained, args.use_pred_head).requires_grad_(True).to(device)
    if not args.use_pred_head:
        encoder.pred = None
    args.in_chans = input_channels(encoder)
    wrapped = distributed.wrap(encoder, device)

    # batches, optimiser, learning rate of every step, labels
    views = support_views(recipe, 0, args.color_jitter_strength, args.supervised_views)
    sampler = support_sampler(args, images)
    data = labelled_batches(args, images, views, sampler, args.supervised_batch_size, device)
    trust = 0.001 if args.use_lars else 0.0
    optimizer = LARS(parameter_groups(encoder, args.weight_decay), 0.0, args.momentum, args.nesterov, trust)
    rates = lr_schedule(args.start_lr, args.lr, args.final_lr, args.warmup, args.epochs, data.steps_per_epoch)
    labels = support_labels(
        args.supervised_batch_size,
        args.classes_per_batch,
        distributed.get_world_size(),
        smoothing=args.label_smoothing,
        views=args.supervised_views,
    ).to(device)

    def criterion(representations: Tensor, _: Tensor) -> Tensor:
        return suncet_loss(representations, labels, args.temperature)

    progress = resume(run, data, len(rates), RUN_FLAGS, encoder, optimizer)
    top1 = None
    with run:
        if run.is_new and evaluation.is_due(-1):
            run.log_evaluation(snn_top1=evaluation.run(encoder, run.stop_if_asked))
        for epoch in run.epochs():
            data.sampler.set_epoch(epoch, run.step_in_epoch)
            train_with_fixed_statistics(wrapped)
            train_one_epoch(wrapped, data.loader, criterion, optimizer, rates, recipe, run)
            if evaluation.is_due(epoch):
                top1 = evaluation.run(encoder, run.stop_if_asked)
                progress.best = max(progress.best, top1)
                run.log_evaluation(snn_top1=top1, best_top1=progress.best)
            run.log_epoch()
            run.end_epoch()
    if top1 is None and evaluation.disabled_reason is None:  # resumed after the last epoch
        top1 = evaluation.run(encoder)
    if top1 is not None:
        distributed.print_once(f"Top-1 accuracy after the last epoch: {top1:.2f} % (best of all {progress.best:.2f} %)")
    return top1


def support_sampler(args: argparse.Namespace, images: PartlyLabelled) -> SupportSampler:
    """Batches with as many steps per epoch as show every image of the smallest class about once."""
    world_size = distributed.get_world_size()
    if args.classes_per_batch is None:
        args.classes_per_batch = len(images.classes)
    if args.supervised_batch_size is None:
        args.supervised_batch_size = min(MOST_SUPPORTS, max(1, images.fewest // world_size))
    rounds = max(1, images.fewest // args.supervised_batch_size)
    return SupportSampler(
        images.labels,
        args.supervised_batch_size,
        args.classes_per_batch,
        steps_per_epoch=rounds * max(1, len(images.classes) // args.classes_per_batch),
        seed=args.seed,
        rank=distributed.get_rank(),
        world_size=world_size,
        inner_epochs=rounds,
        class_names=images.classes,
    )


def train_with_fixed_statistics(encoder: nn.Module) -> None:
    """Training mode, in which batch norms go on with the statistics that they have."""
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def main() -> None:
    distributed.run_script(snn_fine_tune, parse_args)


if __name__ == "__main__":
    main()
