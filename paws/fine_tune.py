"""Fine-tuning with the labels of the training: a linear layer on the first layer of the projection head.

    python fine_tune.py                                      # embedded materials, weights of the run in runs/materials
    torchrun --nproc_per_node=4 fine_tune.py --fname configs/paws/imgnt_fine_tune.yaml --data_path /path/to/imagenet \\
        --subset_path imagenet_subsets --pretrained /path/to/run/paws-latest.pth.tar --output_dir /path/to/fine-tuned

All layers learn. The result is the accuracy after the last epoch. Running the same command again resumes.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paws import flags
from paws.augmentations import Recipe, fine_tune_view, support_views
from paws.encoder import build_encoder
from paws.evaluation import Representation, Validation, eval_transform, validation_of
from paws.fine_tuning import labelled_batches, resume, train_one_epoch
from paws.heads import Encoder, classification_head
from paws.hub import build_for, load_classifier, read_weights
from paws.labels import PartlyLabelled, open_images
from paws.optimisation import LARS, lr_schedule, parameter_groups
from shared import distributed
from shared.images.labelled import NotLabelled, check_classes
from shared.images.loading import EpochBatchSampler
from shared.networks.backbones import input_channels
from shared.networks.batchnorm import synchronize_batchnorm
from shared.networks.pretrained import backbone_of
from shared.networks.weights import load_backbone_weights
from shared.optimisation.precision import Precision
from shared.run.flags import bool_flag
from shared.run.run import Run
from shared.supervised.evaluation import evaluate_classifier

EMBEDDED_DATA_DEFAULTS = flags.ON_EMBEDDED | {
    "batch_size": 40,
    "epochs": 30,
    "lr": 0.01,
    "output_dir": "runs/materials/fine-tune",
}
# A run that is resumed must have these as they were.
RUN_FLAGS = ("model_name", "in_chans", "lr", "epochs", "batch_size", "seed")


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.new_parser(__doc__)
    add = flags.add_label_flags(parser, dataset=None)
    add("--num_classes", type=int, default=None, help="outputs of the classifier; by default as many as classes")
    add("--batch_size", type=int, default=256, help="images per process")
    add("--repeat", type=int, default=1, help="passes over the labelled images in an epoch; for very few of them")
    add("--views", default="basic", choices=("basic", "strong"), help="strong: the views of the supports of PAWS")
    add("--color_jitter_strength", type=float, default=1.0, help="of the strong views")
    add = flags.add_fine_tuning_flags(parser, model_name="resnet50", write_tag="paws-fine-tune")
    add("--allow_partial", action="store_true", help="go on when --pretrained does not fill the backbone")
    add("--training", type=bool_flag, default=True, help="false: only evaluate the fine-tuned network of --pretrained")
    add("--master_port", type=int, default=None, help="ignored: torchrun and SLURM choose it")
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=int, default=50, help="passes over the labelled images")
    add("--lr", type=float, default=0.02, help="learning rate of the first step; a cosine takes it to 0")
    add("--weight_decay", type=float, default=0.0, help="of all but biases and batch norms")
    add("--nesterov", type=bool_flag, default=True, help="Nesterov's momentum")
    add("--use_lars", type=bool_flag, default=False, help="adapt the learning rate layer by layer")
    add("--zero_init", type=bool_flag, default=True, help="start the last layer at 0")
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; without images the defaults are those of the embedded materials."""
    weights = f"{flags.WEIGHTS}, or random"
    return flags.parse_with_embedded_defaults(parser or get_args_parser(), arguments, EMBEDDED_DATA_DEFAULTS, weights)


def fine_tune(args: argparse.Namespace) -> dict[str, float]:
    """Fine-tune and validate; loss and accuracies in percent after the last epoch."""
    run = Run(args, args.amp, f"{args.write_tag}.pth.tar", owns_folder=False)
    device = run.device
    recipe = flags.recipe_of_run(args)

    # images
    images = open_images(args)
    num_classes = len(images.classes) if args.num_classes is None else args.num_classes
    if num_classes < len(images.classes):
        raise ValueError(f"--num_classes {num_classes} is less than the {len(images.classes)} classes of the labels")
    validation = find_validation(args, images)
    validate = partial(validate_encoder, validation, recipe, run.precision, args.batch_size, args.num_workers)

    # encoder
    run.classes = images.classes
    if not args.training:
        check_classes("--pretrained", args.pretrained, images.classes)
        return validate(load_classifier(args.model_name, args.pretrained).to(device))
    encoder = build_classifier(args, num_classes, recipe)
    args.in_chans = input_channels(encoder)
    encoder = synchronize_batchnorm(encoder, device).to(device)
    wrapped = distributed.wrap(encoder, device)

    # batches, optimiser, learning rate of every step
    strong = support_views(recipe, 0, args.color_jitter_strength, views=1)
    views = [fine_tune_view(recipe)] if args.views == "basic" else strong
    data = labelled_batches(args, images, views, labelled_sampler(args, images), args.batch_size, device)
    labels = torch.from_numpy(images.labels).to(device)

    def cross_entropy(logits: Tensor, indices: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels[indices.to(device, non_blocking=True)])

    trust = 0.001 if args.use_lars else 0.0
    optimizer = LARS(parameter_groups(encoder, args.weight_decay), nesterov=args.nesterov, trust_coefficient=trust)
    rates = lr_schedule(args.lr, args.lr, 0.0, 0, args.epochs, data.steps_per_epoch)

    progress = resume(run, data, len(rates), RUN_FLAGS, encoder, optimizer)
    result: dict[str, float] = {}
    with run:
        for epoch in run.epochs():
            data.sampler.set_epoch(epoch, run.step_in_epoch)
            wrapped.train()
            train_one_epoch(wrapped, data.loader, cross_entropy, optimizer, rates, recipe, run)
            if validation is not None and is_due(args, epoch):
                result = validate(encoder, run.stop_if_asked)
                progress.best = max(progress.best, result["acc1"])
                run.log_evaluation(top1=result["acc1"], best_top1=progress.best)
            run.log_epoch()
            run.end_epoch()
    if validation is not None:
        result = result or validate(encoder)  # none yet: resumed after the last epoch
        distributed.print_once(
            f"Top-1 accuracy after the last epoch: {result['acc1']:.2f} % (top-5 {result['acc5']:.2f} %, best top-1 of "
            f"all evaluations {progress.best:.2f} %)"
        )
    return result


def find_validation(args: argparse.Namespace, images: PartlyLabelled) -> Validation | None:
    """Images to classify; says why when there are none.

    Raises:
        ValueError: If there are none with ``--training false``.
    """
    try:
        return validation_of(args, images, Path(args.output_dir) / "bad_images_val.txt")
    except NotLabelled as error:
        if not args.training:
            raise ValueError(f"--training false: {error}") from error
        distributed.print_once(f"no validation: {error}")
        return None


def is_due(args: argparse.Namespace, epoch: int) -> bool:
    """Whether to validate after ``epoch``: at the end, and every ``--eval_knn_freq`` epochs."""
    every = args.eval_knn_freq
    return epoch == args.epochs - 1 or bool(every and (epoch + 1) % every == 0)


# --- Network ----------------------------------------------------------------------------------------------------------


def build_classifier(args: argparse.Namespace, num_classes: int, recipe: Recipe) -> Encoder:
    """Backbone and first layer of the projection head from the file, and a new last layer.

    Raises:
        ValueError: If the file does not fill the backbone.
    """
    if args.pretrained == "random":
        encoder = build_encoder(args.model_name, img_size=recipe.large[0], in_chans=args.in_chans)
        encoder.fc = classification_head(encoder.embed_dim, num_classes)
    else:
        weights = read_weights(args.model_name, args.pretrained)
        encoder = build_for(args.model_name, weights)
        load_backbone_weights(backbone_of(encoder), weights, allow_partial=args.allow_partial)
        encoder.fc = classification_head(encoder.embed_dim, num_classes)
        own = {f"fc.{name}": value.shape for name, value in encoder.fc.state_dict().items()}
        kept = {name: value for name, value in weights.head.items() if own.get(name) == value.shape}
        kept = kept if "fc.fc1.weight" in kept else {}  # else it is the head of another method
        encoder.load_state_dict(kept, strict=False)
        distributed.print_once(f"{len(kept)} of {len(own)} entries of the classifier come from the projection head")
    if args.zero_init:
        nn.init.zeros_(encoder.fc.fc2.weight)
        nn.init.zeros_(encoder.fc.fc2.bias)
    return encoder


def validate_encoder(
    validation: Validation,
    recipe: Recipe,
    precision: Precision,
    batch_size: int,
    num_workers: int,
    encoder: Encoder,
    between_batches: Callable[[], None] | None = None,
) -> dict[str, float]:
    """``loss``, ``acc1`` and ``acc5`` over all images to classify, accuracies in percent.

    Args:
        between_batches: Called after every batch, equally often on every process; may raise to stop.
    """
    dataset = validation.dataset(eval_transform(recipe, encoder))
    how = (precision, batch_size, num_workers, between_batches, validation.absent)
    result = evaluate_classifier(Representation(encoder), dataset, *how)
    distributed.print_once(f"{validation.describe()}: top-1 {result['acc1']:.2f} %, top-5 {result['acc5']:.2f} %")
    return result


# --- Batches ----------------------------------------------------------------------------------------------------------


class LabelledSampler(EpochBatchSampler):
    """Batches of (pass, index) keys of the labelled images only, ``repeat`` passes in an epoch."""

    def __init__(self, rows: np.ndarray, repeat: int, *args, **kwargs):
        super().__init__(repeat * len(rows), *args, **kwargs)
        self.rows, self.repeat = rows, repeat

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in super().__iter__():
            places = [(epoch, *divmod(position, len(self.rows))) for epoch, position in batch]
            yield [(epoch * self.repeat + number, int(self.rows[row])) for epoch, number, row in places]


def labelled_sampler(args: argparse.Namespace, images: PartlyLabelled) -> LabelledSampler:
    """The batches of this process; a last one of a single image, which batch norms cannot normalise, is left out."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    per_rank = -(-args.repeat * len(images.labelled) // world_size)
    drop_last = per_rank > 1 and per_rank % args.batch_size == 1
    return LabelledSampler(images.labelled, args.repeat, args.batch_size, args.seed, rank, world_size, drop_last)


def main() -> None:
    distributed.run_script(fine_tune, parse_args)


if __name__ == "__main__":
    main()
