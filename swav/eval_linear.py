"""Linear classification on frozen features (Caron et al. 2020, section 4.1).

    python eval_linear.py                                    # embedded materials, weights of the run in runs/materials
    torchrun --nproc_per_node=8 eval_linear.py --data_path /path/to/imagenet --dump_path /path/to/linear
                                                             # released SwAV, 800 epochs: 75.3

A linear layer learns on the pooled output of the trunk, with random crops and flips. The result is the accuracy after
the last epoch. Running the same command again resumes.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.flags import add_data_flags, add_probe_flags, add_process_flags, parse_evaluation
from shared.evaluation.linear import LinearClassifier, load_classifier, tell_accuracy
from shared.networks.batchnorm import synchronize_batchnorm
from shared.networks.weights import weights_checksum
from shared.run.flags import bool_flag
from swav.evaluation import evaluation_parser, load_frozen
from swav.hub import CARD, LINEAR_CLASSIFIER, fetch
from swav.resnet50 import PrototypeNetwork, ResNet

# A run that is resumed must have these as they were.
RUN_FLAGS = """arch global_pooling use_bn epochs batch_size lr wd nesterov scheduler_type decay_epochs gamma final_lr
    seed""".split()


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument_group("features").add_argument
    add("--global_pooling", type=bool_flag, default=True, help="average the whole feature map; false: 6x6 windows")
    add("--use_bn", type=bool_flag, default=False, help="batch normalisation before the classifier, for 6x6 windows")

    add = add_data_flags(parser, batch_size=32)
    add("--num_labels", type=int, default=1000, help="outputs of the classifier")
    add = add_probe_flags(parser, epochs=100, seed=31)
    add("--lr", type=float, default=0.3, help="learning rate at the start; it fits 8 processes with batches of 32")
    add("--wd", type=float, default=1e-6, help="weight decay")
    add("--nesterov", type=bool_flag, default=False, help="Nesterov momentum")
    add("--scheduler_type", default="cosine", choices=("step", "cosine"), help="learning rate over the epochs")
    add("--decay_epochs", type=int, nargs="+", default=[60, 80], help="step: epochs at which the rate drops")
    add("--gamma", type=float, default=0.1, help="step: by this factor")
    add("--final_lr", type=float, default=0.0, help="cosine: learning rate at the end")

    add = parser.add_argument_group("run").add_argument
    folder = "for checkpoint.pth.tar and log.txt; not the folder of the training run"
    add("--dump_path", "--output_dir", dest="output_dir", default=".", help=folder)
    add("--evaluate", action="store_true", help="only validate the classifier of --linear_weights")
    add("--linear_weights", default="", help="with --evaluate: a file; without it the released one of swav_800ep")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    embedded = {
        "num_labels": 12,
        "crop_scale": (0.6, 1.0),
        "epochs": 10,
        "lr": 0.03,
        "output_dir": "runs/materials/linear",
    }
    return parse_evaluation(get_args_parser(), arguments, pretrained=CARD.embedded_run, **embedded)


def eval_linear(args: argparse.Namespace) -> dict[str, float]:
    """Train and validate the classifier; loss and accuracies in percent after the last epoch."""
    device = frozen.start(args)
    network, transform = load_frozen(args)
    sources = frozen.labelled_sources(args, classifier=args.linear_weights, num_labels=args.num_labels)

    # frozen trunk and classifier
    checksum = weights_checksum(network)
    features = FrozenFeatures(network.to(device), args.global_pooling)
    feature = features(torch.zeros(1, transform.in_chans, *[args.image_size] * 2, device=device))
    classifier = RegLog(feature.shape[1:], args.num_labels, args.use_bn).to(device)
    classifier = synchronize_batchnorm(classifier, device)
    training = frozen.LabelledTraining(args, CARD, classifier, features, sources, transform, device)
    if args.evaluate:
        load_classifier(classifier, args.linear_weights or fetch_linear_weights(args.pretrained))
        return tell_accuracy(training.validate(), len(sources[1]))

    # optimiser, schedule, epochs
    optimizer = torch.optim.SGD(
        classifier.parameters(), args.lr, momentum=0.9, weight_decay=args.wd, nesterov=args.nesterov
    )
    if args.scheduler_type == "step":
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, args.decay_epochs, args.gamma)
    else:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs, eta_min=args.final_lr)
    return training.train(optimizer, scheduler, checksum, flags=RUN_FLAGS)


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


def fetch_linear_weights(pretrained: str) -> Path:
    """The released classifier of swav_800ep."""
    if pretrained not in ("", "swav_800ep"):
        raise ValueError(
            f"the released linear classifier is that of swav_800ep, not of --pretrained {pretrained}; give a file "
            "as --linear_weights"
        )
    return fetch(LINEAR_CLASSIFIER)


def main() -> None:
    distributed.run_script(eval_linear, parse_args)


if __name__ == "__main__":
    main()
