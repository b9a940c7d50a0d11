"""Linear classification on frozen features (Caron et al. 2020, section 4.1).

    python eval_linear.py                                    # embedded digits, weights of the run in runs/digits
    torchrun --nproc_per_node=8 eval_linear.py --data_path /path/to/imagenet --dump_path /path/to/linear
                                                             # released SwAV, 800 epochs: 75.3

A linear layer learns on the pooled output of the trunk, with random crops and flips. The result is the accuracy after
the last epoch. Running the same command again resumes.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import distributed
from shared.evaluation.linear import LinearClassifier, train_one_epoch, validate
from shared.images.loading import EvalDataset
from shared.networks.batchnorm import synchronize_batchnorm
from shared.networks.weights import safe_load, weights_checksum
from shared.run import randomness
from shared.run.flags import bool_flag
from swav.evaluation import (
    EMBEDDED_DATA_DEFAULTS,
    add_data_flags,
    add_process_flags,
    add_run_flags,
    add_training_flags,
    bad_images_of,
    eval_transform,
    evaluation_parser,
    labelled_sources,
    on_device,
    parse_with_embedded_defaults,
    resume,
    save_epoch,
    set_weights,
    train_loader,
)
from swav.hub import LINEAR_CLASSIFIER, fetch, load_backbone
from swav.resnet50 import PrototypeNetwork, ResNet

# A run that is resumed must have these as they were.
RUN_FLAGS = ("arch", "global_pooling", "use_bn", "epochs", "lr", "wd", "nesterov", "scheduler_type",
             "decay_epochs", "gamma", "final_lr")  # fmt: skip


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument_group("features").add_argument
    add("--global_pooling", type=bool_flag, default=True, help="average the whole feature map; false: 6x6 windows")
    add("--use_bn", type=bool_flag, default=False, help="batch normalisation before the classifier, for 6x6 windows")

    add_data_flags(parser)
    add = parser.add_argument_group("optimisation").add_argument
    add_training_flags(add, epochs=100)
    add("--lr", type=float, default=0.3, help="learning rate at the start; it fits 8 processes with batches of 32")
    add("--wd", type=float, default=1e-6, help="weight decay")
    add("--nesterov", type=bool_flag, default=False, help="Nesterov momentum")
    add("--scheduler_type", default="cosine", choices=("step", "cosine"), help="learning rate over the epochs")
    add("--decay_epochs", type=int, nargs="+", default=[60, 80], help="step: epochs at which the rate drops")
    add("--gamma", type=float, default=0.1, help="step: by this factor")
    add("--final_lr", type=float, default=0.0, help="cosine: learning rate at the end")
    add("--val_freq", type=int, default=1, help="validate every so many epochs, and after the last one")

    add = add_run_flags(parser, "the classifier of --linear_weights")
    add("--linear_weights", default="", help="with --evaluate: a file; without it the released one of swav_800ep")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    return parse_with_embedded_defaults(
        get_args_parser(),
        arguments,
        **EMBEDDED_DATA_DEFAULTS,
        num_labels=10,
        crop_scale=(0.6, 1.0),
        epochs=10,
        lr=0.03,
        dump_path="runs/digits/linear",
    )


def eval_linear(args: argparse.Namespace) -> dict[str, float]:
    """Train and validate the classifier; loss and accuracies in percent after the last epoch."""
    device = distributed.init(args.dist_url, args.device)
    randomness.seed_everything(args.seed)

    # data, frozen trunk, classifier
    train, val = labelled_sources(args.data_path, args.val_path, args.allow_absolute_paths, args.num_labels)
    for source in (train, val):
        distributed.print_once(source.describe())
    network = load_backbone(args.arch, args.pretrained, args.allow_partial).to(device)
    checksum = weights_checksum(network)
    val_set = EvalDataset(val, eval_transform(args.image_size, network))
    features = FrozenFeatures(network, args.global_pooling)
    feature_shape = features(torch.zeros(1, val_set.transform.in_chans, *[args.image_size] * 2, device=device)).shape[
        1:
    ]
    classifier = RegLog(feature_shape, args.num_labels, args.use_bn).to(device)
    classifier = synchronize_batchnorm(classifier, device)

    def validate_now() -> dict[str, float]:
        return validate(classifier, features, val_set, device, args.batch_size, args.workers)

    if args.evaluate:
        set_weights(classifier, *read_linear_weights(args.linear_weights, args.pretrained))
        result = validate_now()
        distributed.print_once(f"Accuracy of the network on the {len(val)} test images: {result['acc1']:.1f}%")
        return result

    # loader, optimiser, schedule
    bad_images = bad_images_of(train, args)
    loader, sampler = train_loader(
        train,
        args.image_size,
        args.crop_scale,
        args.batch_size,
        args.seed,
        val_set.transform.in_chans,
        bad_images,
        args.workers,
        device,
    )
    wrapped = distributed.wrap(classifier, device)
    optimizer = torch.optim.SGD(
        classifier.parameters(), args.lr, momentum=0.9, weight_decay=args.wd, nesterov=args.nesterov
    )
    if args.scheduler_type == "step":
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, args.decay_epochs, args.gamma)
    else:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs, eta_min=args.final_lr)

    # epochs
    flags = {name: getattr(args, name) for name in RUN_FLAGS}
    first_epoch, log = resume(args.dump_path, classifier, optimizer, scheduler, flags, checksum)
    best_acc = max((line["test_acc1"] for line in log if "test_acc1" in line), default=0.0)
    for epoch in range(first_epoch, args.epochs):
        sampler.set_epoch(epoch)
        line = {"epoch": epoch, "train_lr": optimizer.param_groups[0]["lr"]}
        line["train_loss"] = train_one_epoch(wrapped, features, on_device(loader, device), optimizer)
        line["bad_images"] = bad_images.count()
        if (epoch + 1) % args.val_freq == 0 or epoch + 1 == args.epochs:
            result = validate_now()
            best_acc = max(best_acc, result["acc1"])
            line |= {f"test_{name}": value for name, value in result.items()} | {"best_acc1": best_acc}
        scheduler.step()
        log.append(line)
        save_epoch(args.dump_path, classifier, optimizer, scheduler, flags, checksum, log, best_acc)
    if first_epoch >= args.epochs:  # resumed after the last epoch
        result = validate_now()
    distributed.print_once(
        f"Top-1 accuracy after the last epoch: {result['acc1']:.2f} % (top-5 {result['acc5']:.2f} %, "
        f"best top-1 of all epochs {best_acc:.2f} %)"
    )
    return result


class FrozenFeatures:
    """What the linear classifier sees of an image: the trunk's output, averaged over the whole map or over windows.

    Args:
        network: Without heads, in evaluation mode.
        global_pooling: False: averages over 6x6 windows, moved by one.
    """

    def __init__(self, network: PrototypeNetwork, global_pooling: bool):
        self.network, self.global_pooling = network, global_pooling
        if not global_pooling:
            if not isinstance(network, ResNet):
                raise ValueError("--global_pooling false needs the feature map of resnet50, resnet50w2, w4 or w5")
            network.eval_mode = True

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to features (B, D), or (B, D, H / 32 - 5, W / 32 - 5)."""
        features = self.network(images)
        return features if self.global_pooling else pool_windows(features)


def pool_windows(feature_map: Tensor) -> Tensor:
    """Averages over 6x6 windows, (B, D, H, W) -> (B, D, H - 5, W - 5); 2x2 of them for images of 224 pixels."""
    if min(feature_map.shape[2:]) < 6:
        size = " x ".join(map(str, feature_map.shape[2:]))
        raise ValueError(f"--global_pooling false: a feature map of {size} has no 6x6 window; raise --image_size")
    return F.avg_pool2d(feature_map, kernel_size=6, stride=1)


class RegLog(LinearClassifier):
    """Logistic regression, with batch normalisation before it where it is asked for.

    Args:
        feature_shape: Of one image: (D,), or (D, H, W) for windows.
        num_labels: Number of classes.
        use_bn: Normalise each of the D channels; only for windows, as in the official code.
    """

    def __init__(self, feature_shape: tuple[int, ...], num_labels: int, use_bn: bool = False):
        super().__init__(torch.Size(feature_shape).numel(), num_labels)
        if use_bn and len(feature_shape) == 1:
            raise ValueError("--use_bn true needs --global_pooling false")
        self.bn = nn.BatchNorm2d(feature_shape[0]) if use_bn else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, *feature_shape) to logits (B, num_labels)."""
        return super().forward(self.bn(features))


def read_linear_weights(file: str, pretrained: str) -> tuple[dict[str, Tensor], str]:
    """State dict of a classifier and the file's name: ours, an official one, or the released one of swav_800ep."""
    if not file:
        if pretrained not in ("", "swav_800ep"):
            raise ValueError(
                f"the released linear classifier is that of swav_800ep, not of --pretrained {pretrained}; give a file "
                "as --linear_weights"
            )
        file = str(fetch(LINEAR_CLASSIFIER))
    elif not Path(file).is_file():
        raise ValueError(f"--linear_weights {file} is not a file")
    checkpoint = safe_load(file)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"--linear_weights {file} has no state_dict")
    return checkpoint["state_dict"], file


def main() -> None:
    with distributed.clean_exit():
        eval_linear(parse_args())


if __name__ == "__main__":
    main()
