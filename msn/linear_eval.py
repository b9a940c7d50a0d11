"""Linear classification on frozen features with all labels (Assran et al. 2022, appendix A.2).

    python linear_eval.py --epochs 10                        # embedded materials, weights of the run in runs/materials
    torchrun --nproc_per_node=8 linear_eval.py --fname configs/eval/lineval_msn_vits16.yaml --batch_size 1024 \\
        --data_path /path/to/imagenet --folder /path/to/run  # ViT-S/16: 76.9

The classifier is a layer norm, a normalisation to length 1 and a linear layer on the class tokens of the last blocks;
it learns with random crops and flips. The result is the accuracy after the last epoch. Running the same command again
resumes.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msn.flags import add_data_flags, finish, load_frozen, network_parser
from msn.hub import CARD
from msn.labelled_training import Validation, from_official, to_official, training_batches
from msn.logistic_eval import LastClassToken
from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.features import check_features
from shared.evaluation.flags import add_process_flags
from shared.evaluation.linear import tell_accuracy
from shared.images.views import ViewRecipe
from shared.multicrop import MultiCropDataset, normalize_views
from shared.networks.weights import weights_checksum
from shared.optimisation.optim import clip_grad_norm_per_tensor_
from shared.optimisation.schedules import cosine_schedule
from shared.run.checkpoint import load_latest
from shared.run.flags import add_run_flags, bool_flag
from shared.run.run import Run
from shared.run.yaml_config import parse_args_with_config

# A run that is resumed must have these as they were.
RUN_FLAGS = tuple(
    "model_name num_blocks normalize num_classes image_size crop_scale epochs lr weight_decay seed".split()
)


def get_args_parser() -> argparse.ArgumentParser:
    """Flags in the sections of the published YAML file."""
    parser = network_parser(__doc__, file_flag="pretrain_path", file_group="logging")
    parser.add_argument("--fname", default=None, help="YAML file of defaults for the flags; the command line wins")
    add_run_flags(parser, knn=False, pictures=False)
    add_process_flags(parser, title="meta")
    add = parser.add_argument_group("meta").add_argument
    add("--training", type=bool_flag, default=True, help="false: only validate the classifier in --folder")
    add("--load_checkpoint", type=bool_flag, default=False, help="true: a run without a checkpoint is an error")
    add("--copy_data", type=bool_flag, default=False, help="not here, and no other value")
    add("--master_port", type=int, default=None, help="ignored: read from the environment")

    add = add_data_flags(parser)
    add("--num_classes", type=int, default=1000, help="outputs of the classifier")
    add("--crop_scale", type=float, nargs=2, default=(0.08, 1.0), help="area range of the train crops")

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
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line and its YAML file; ``parser`` may have further flags."""
    parser = parser or get_args_parser()
    embedded = {"num_classes": 12, "crop_scale": (0.6, 1.0), "batch_size": 64, "lr": 0.5}
    embedded["output_dir"] = CARD.embedded_run
    args = finish(parser, lambda: parse_args_with_config(parser, arguments), **embedded)
    args.crop_scale = tuple(args.crop_scale)
    if args.copy_data:
        parser.error("--copy_data true has no effect")
    if args.pretrain_path and not args.pretrained:
        args.pretrained = args.output_dir  # as in the official code
    return args


class LinearClassifier(nn.Module):
    """Layer norm, normalisation to length 1 if asked for, linear layer."""

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
    run = Run(args, args.amp, f"{args.write_tag}-lin-eval.pth.tar", owns_folder=False)
    device = run.device
    encoder, transform = load_frozen(args, "pretrain_path")
    train, val = frozen.labelled_sources(args, num_classes=args.num_classes)

    # frozen features and linear classifier
    tokens = LastClassToken(encoder.to(device), num_blocks=args.num_blocks)
    classifier = LinearClassifier(encoder.embed_dim * args.num_blocks, args.num_classes, args.normalize).to(device)

    def features(images: Tensor) -> Tensor:
        with run.precision.autocast():
            return tokens(images).float()

    # data
    recipe = ViewRecipe(args.image_size, args.crop_scale, interpolation="bilinear")
    bad_images = frozen.bad_images_of(args, train, run.output_dir / "bad_images.txt")
    views = MultiCropDataset(train, [recipe], args.seed, in_chans=transform.in_chans, bad_images=bad_images)
    data = training_batches(args, views, bad_images, train.checksum(), device, drop_last=False)
    val_set = frozen.val_images(args, val, transform)
    network = ImageClassifier(features, classifier)
    validation = Validation(network, val_set, device, args.batch_size, args.num_workers)

    # optimiser, schedule
    optimizer = build_optimizer(classifier, args.lr, args.weight_decay)
    lrs = cosine_schedule(args.lr, 0.0, args.epochs, data.steps_per_epoch)
    wrapped = distributed.wrap(classifier, device)

    # checkpoints under the names of the official ones
    checksum, checkpoint = weights_checksum(encoder), load_latest(run.path)
    if checkpoint is None and (args.load_checkpoint or not args.training):
        raise ValueError(f"--load_checkpoint true or --training false: there is no {run.path}")
    run.resume(
        data,
        len(lrs),
        RUN_FLAGS,
        checkpoint=checkpoint or {},
        to_official=partial(to_official, pretrained=checksum, target_encoder=encoder),
        from_official=partial(from_official, pretrained=checksum, path=run.path),
        classifier=classifier,
        opt=optimizer,
        best_top1_acc=validation,
    )
    if not args.training:
        return tell_accuracy(validation.run(), len(val))

    with run:
        for epoch in run.epochs():
            data.sampler.set_epoch(epoch, run.step_in_epoch)
            train_one_epoch(wrapped, features, data.loader, optimizer, lrs, run)
            is_due = (epoch + 1) % args.val_freq == 0 or epoch + 1 == args.epochs
            validation.end_epoch(run, bad_images, is_due)
    return validation.end()


def train_one_epoch(
    classifier: nn.Module,
    features: Callable[[Tensor], Tensor],
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    lrs: np.ndarray,
    run: Run,
) -> None:
    """Cross-entropy on every batch; only the classifier learns.

    Args:
        classifier: Maps features (B, D) to logits; wrapped for several processes if there are any.
        features: The frozen network, images (B, C, H, W) to features (B, D).
        loader: Yields (one batch of views in a list, labels, indices): uint8, or float if normalised already.
        lrs: Learning rates, one per step of the run.

    Raises:
        ValueError: If the features are not finite or zero.
    """
    parameters = list(classifier.parameters())
    classifier.train()
    for step, (views, labels, _) in run.steps(loader):
        for group in optimizer.param_groups:
            group["lr"] = float(lrs[step])
        (images,) = normalize_views(views, run.device, CARD.mean, CARD.std)
        labels = labels.to(run.device, non_blocking=True)
        with torch.no_grad():
            inputs = features(images)
        if run.logs_this_step:
            check_features(inputs)
        loss = F.cross_entropy(classifier(inputs), labels)
        optimizer.zero_grad(set_to_none=True)
        run.backward(loss, optimizer)
        run.update(clip_grad_norm_per_tensor_(parameters, max_norm=0), optimizer)
        run.end_step(len(labels), {"loss": loss, "lr": lrs[step]})


def main() -> None:
    distributed.run_script(linear_eval, parse_args)


if __name__ == "__main__":
    main()
