"""Linear classification on frozen features with all labels (Assran et al. 2022, appendix A.2).

    python linear_eval.py --epochs 10                        # embedded digits, weights of the run in runs/digits
    torchrun --nproc_per_node=8 linear_eval.py --fname configs/eval/lineval_msn_vits16.yaml --batch_size 1024 \\
        --data_path /path/to/imagenet --folder /path/to/run  # ViT-S/16: 76.9

The classifier is a layer norm, a normalisation to length 1 and a linear layer on the class tokens of the last blocks;
it learns with random crops and flips. The result is the accuracy after the last epoch. Running the same command again
resumes.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from msn.flags import (
    add_data_flags,
    add_process_flags,
    add_saving_flags,
    finish,
    labelled_sources,
    load_chosen_encoder,
    network_parser,
)
from msn.hub import MEAN, RUN_ON_DIGITS, STD
from msn.labelled_training import LabelledTraining, mean_loss
from msn.logistic_eval import LastClassToken
from shared import distributed
from shared.evaluation.features import check_features
from shared.images.loading import BadImages, EpochBatchSampler, EvalDataset, EvalTransform, make_loader
from shared.images.views import ViewRecipe
from shared.multicrop import MultiCropDataset, normalize_views
from shared.networks.backbones import input_channels
from shared.networks.weights import weights_checksum
from shared.optimisation.precision import Precision
from shared.optimisation.schedules import cosine_schedule
from shared.run import randomness
from shared.run.flags import bool_flag
from shared.run.yaml_config import parse_args_with_config

# A run that is resumed must have these as they were.
RUN_FLAGS = ("model_name", "num_blocks", "normalize", "num_classes", "image_size", "crop_scale", "epochs", "lr",
             "weight_decay", "seed")  # fmt: skip


def get_args_parser() -> argparse.ArgumentParser:
    """Flags in the sections of the published YAML file."""
    parser = network_parser(__doc__, file_flag="pretrain_path", file_group="logging")
    parser.add_argument("--fname", default=None, help="YAML file of defaults for the flags; the command line wins")
    add_process_flags(parser, title="meta")
    add = parser.add_argument_group("meta").add_argument
    add("--training", type=bool_flag, default=True, help="false: only validate the classifier in --folder")
    add("--load_checkpoint", type=bool_flag, default=False, help="true: a run that finds no checkpoint is an error; a "
        "run that finds its own goes on in any case")  # fmt: skip
    add("--copy_data", type=bool_flag, default=False, help="not here, and no other value")
    add("--master_port", type=int, default=None, help="ignored: read from the environment")

    add = add_data_flags(parser)
    add("--num_classes", type=int, default=1000, help="outputs of the classifier")
    add("--crop_scale", type=float, nargs=2, default=(0.08, 1.0), help="area range of the train crops")
    add("--on_bad_image", default="replace", choices=("replace", "error"), help="what an unreadable train image does")
    add("--max_bad_fraction", type=float, default=0.01,
        help="stop when more train images than this share are unreadable")  # fmt: skip

    add = parser.add_argument_group("optimization").add_argument
    add("--num_blocks", type=int, default=1, help="class tokens of so many last blocks")
    add("--normalize", type=bool_flag, default=True, help="normalise to length 1 after the layer norm")
    add("--epochs", type=int, default=100, help="passes over the train images")
    add("--batch_size", type=int, default=256, help="images per process")
    add("--lr", type=float, default=6.4, help="learning rate at the start, for 8,192 images per step; it is not scaled")
    add("--weight_decay", type=float, default=0.0, help="of the linear layer's weight")
    add("--val_freq", type=int, default=1, help="validate every so many epochs, and after the last one")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="of the frozen encoder")
    add("--seed", type=int, default=0, help="of the classifier, the order of the images and the crops")

    add = parser.add_argument_group("logging").add_argument
    add("--folder", "--output_dir", default=".", dest="output_dir", help="for the checkpoint and the log")
    add("--write_tag", default="msn", help="start of their names")
    add_saving_flags(add)
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line and its YAML file.

    Args:
        arguments: The command line's own by default.
        parser: That of :func:`get_args_parser` with further flags, for scripts that have them.
    """
    parser = parser or get_args_parser()
    digits = {"num_classes": 10, "crop_scale": (0.6, 1.0), "batch_size": 64, "lr": 0.5, "output_dir": RUN_ON_DIGITS}
    args = finish(parser, lambda: parse_args_with_config(parser, arguments), **digits)
    args.crop_scale = tuple(args.crop_scale)
    if args.copy_data:
        parser.error("--copy_data true has no effect")
    if args.pretrain_path and not args.pretrained:
        args.pretrained = args.output_dir  # as in the official code
    return args


class LinearClassifier(nn.Module):
    """Layer norm, L2 normalisation, linear layer.

    Args:
        dim: Size of a feature.
        num_classes: Outputs.
        normalize: Whether to normalise to length 1.
    """

    def __init__(self, dim: int, num_classes: int, normalize: bool = True):
        super().__init__()
        self.normalize = normalize
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, dim) to logits (B, num_classes)."""
        features = self.norm(features)
        return self.linear(F.normalize(features, dim=1) if self.normalize else features)


class RateInMomentumSGD(torch.optim.Optimizer):
    """Nesterov's SGD whose momentum holds steps, learning rate included, and not gradients.

    With a learning rate that changes, old gradients keep the rate of their own step; torch's SGD would apply today's.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        momentum: Weight of the old step.
        weight_decay: Added to the gradient as ``weight_decay * p``.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                step = -group["lr"] * (p.grad + group["weight_decay"] * p)
                state = self.state[p]
                old = state.get("momentum_buffer")
                state["momentum_buffer"] = step if old is None else group["momentum"] * old + step
                p.add_(step + group["momentum"] * state["momentum_buffer"])


def build_optimizer(classifier: nn.Module, lr: float, weight_decay: float) -> RateInMomentumSGD:
    """Weight decay for the linear layer's weight only."""
    decayed = [p for p in classifier.parameters() if p.ndim > 1]
    plain = [p for p in classifier.parameters() if p.ndim == 1]
    return RateInMomentumSGD([{"params": decayed, "weight_decay": weight_decay}, {"params": plain}], lr)


class ImageClassifier(nn.Module):
    """Images to logits: the frozen features and the classifier, whose mode alone changes with this module's.

    Args:
        features: Images (B, C, H, W) to features (B, D).
    """

    def __init__(self, features: Callable[[Tensor], Tensor], classifier: nn.Module):
        super().__init__()
        self.features, self.classifier = features, classifier

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        check_features(features)
        return self.classifier(features)


def linear_eval(args: argparse.Namespace) -> dict[str, float]:
    """Train and validate the classifier; loss and accuracies in percent after the last epoch."""
    device = distributed.init(args.dist_url, args.device)
    randomness.seed_everything(args.seed)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    precision = Precision(args.amp, device)
    output_dir = Path(args.output_dir)
    if distributed.is_main_process():
        output_dir.mkdir(parents=True, exist_ok=True)
    distributed.barrier()

    # data
    train, val = labelled_sources(args, args.num_classes)
    for source in (train, val):
        distributed.print_once(source.describe())

    # frozen encoder and linear classifier
    encoder = load_chosen_encoder(args, "pretrain_path").to(device)
    tokens = LastClassToken(encoder, num_blocks=args.num_blocks)
    classifier = LinearClassifier(encoder.embed_dim * args.num_blocks, args.num_classes, args.normalize).to(device)
    in_chans, resize_px = input_channels(encoder), round(args.image_size * 256 / 224)
    val_set = EvalDataset(val, EvalTransform(resize_px, args.image_size, MEAN, STD, in_chans, "bilinear"))

    def features(images: Tensor) -> Tensor:
        with precision.autocast():
            return tokens(images).float()

    image_classifier = ImageClassifier(features, classifier)

    # loader, optimiser, schedule
    bad_images = BadImages(len(train), output_dir / "bad_images.txt", args.on_bad_image, args.max_bad_fraction)
    recipe = ViewRecipe(args.image_size, args.crop_scale, interpolation="bilinear")
    sampler = EpochBatchSampler(len(train), args.batch_size, args.seed, rank, world_size, drop_last=False)
    loader = make_loader(
        MultiCropDataset(train, [recipe], args.seed, in_chans=in_chans, bad_images=bad_images),
        batch_sampler=sampler,
        num_workers=args.num_workers,
        device=device,
    )
    optimizer = build_optimizer(classifier, args.lr, args.weight_decay)
    lrs = cosine_schedule(args.lr, 0.0, args.epochs, len(sampler))
    wrapped = distributed.wrap(classifier, device)

    # resume
    run = LabelledTraining(
        args,
        name=f"{args.write_tag}-lin-eval",
        parts={"classifier": classifier, "opt": optimizer},
        precision=precision,
        must_match=RUN_FLAGS,
        images=train.checksum(),
        pretrained=weights_checksum(encoder),
        steps_per_epoch=len(sampler),
        frozen={"target_encoder": encoder},
    )
    if not run.resume() and (args.load_checkpoint or not args.training):
        raise ValueError(f"--load_checkpoint true or --training false: there is no {run.path}")
    if not args.training:
        result = run.validate(image_classifier, val_set)
        distributed.print_once(f"Accuracy of the network on the {len(val)} test images: {result['acc1']:.1f} %")
        return result

    # epochs
    result = None
    with run.checkpointer() as checkpointer:
        for epoch in range(run.first_epoch, args.epochs):
            sampler.set_epoch(epoch, run.first_step)
            line = {"epoch": epoch}
            line["train_loss"] = train_one_epoch(
                wrapped,
                features,
                on_device(loader, device),
                optimizer,
                lrs[epoch * len(sampler) + run.first_step :],
                run.epoch_loss,
                partial(checkpointer.after_step, epoch),
                run.first_step,
            )
            line["bad_images"] = bad_images.count()
            run.first_step = 0
            is_due = (epoch + 1) % args.val_freq == 0 or epoch + 1 == args.epochs
            result = run.validate(image_classifier, val_set, checkpointer, epoch) if is_due else None
            run.end_epoch(line, result, checkpointer)
    if result is None:  # resumed after the last epoch
        result = run.validate(image_classifier, val_set)
    distributed.print_once(run.result_line(result))
    return result


def train_one_epoch(
    classifier: nn.Module,
    features: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    lrs: Sequence[float],
    total: Tensor | None = None,
    after_step: Callable[[int], None] = lambda steps: None,
    first_step: int = 0,
) -> float:
    """Cross-entropy on every batch with its own learning rate; only the classifier learns.

    Args:
        classifier: Maps features (B, D) to logits; wrapped for several processes if there are any.
        features: The frozen network, images (B, C, H, W) to features (B, D).
        batches: Images and labels (B,), on the device of the classifier.
        lrs: Learning rates, one per batch.
        total: The steps of this epoch that were done before: sum of the losses of this process's images, and their
            number; those of the batches are added in place.
        after_step: Called with the number of steps done in the epoch.
        first_step: Of the batches, in the epoch.

    Returns:
        Mean loss over the images of all processes in the epoch.

    Raises:
        ValueError: If the features are not finite or zero, or the loss is not finite.
    """
    classifier.train()
    if total is None:
        total = torch.zeros(2, dtype=torch.double, device=next(classifier.parameters()).device)
    for step, (images, labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = float(lrs[step])
        with torch.no_grad():
            inputs = features(images)
        if step == 0:
            check_features(inputs)
        loss = F.cross_entropy(classifier(inputs), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += torch.stack([loss.detach().double(), torch.ones_like(total[0])]) * len(labels)
        after_step(first_step + step + 1)
    return mean_loss(total)


def on_device(loader: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images and labels, with a progress bar on a terminal."""
    hidden = not (distributed.is_main_process() and sys.stderr.isatty())
    for views, labels, _ in tqdm(loader, leave=False, disable=hidden):
        yield normalize_views(views, device, MEAN, STD)[0], labels.to(device, non_blocking=True)


def main() -> None:
    with distributed.clean_exit():
        linear_eval(parse_args())


if __name__ == "__main__":
    main()
