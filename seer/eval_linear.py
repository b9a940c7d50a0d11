"""Linear classification on frozen maps of SEER (Goyal et al. 2021, section 4.3).

    python eval_linear.py                                    # embedded materials, weights of the run in runs/materials
    torchrun --nproc_per_node=8 eval_linear.py --arch regnet128Gf --layer res5 --data_path /path/to/imagenet \\
        --output_dir /path/to/linear                         # released weights: 76.0 with the best of the layers

The map of a stage is averaged to a few places, normalised, and classified by one linear layer; ``avgpool`` is the
representation itself. The papers report the best layer: run each. Running the same command again resumes.
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

from seer.hub import CARD
from seer.regnet import RegNet
from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.flags import (
    add_data_flags,
    add_probe_flags,
    add_process_flags,
    parse_evaluation,
    take_from_run,
)
from shared.evaluation.linear import LinearClassifier
from shared.images.loading import EvalTransform
from shared.networks.batchnorm import synchronize_batchnorm
from shared.networks.pretrained import flags_of_run, load_pretrained, size_flag
from shared.networks.weights import weights_checksum
from shared.run.flags import Parser

PLACES = {"res4": (3, 1), "res5": (2, 1), "avgpool": (1, 1)}  # rows and columns to which a map is averaged
DEFAULTS = {"arch": "regnet256Gf_1", "image_size": 224}
EMBEDDED = {"pretrained": CARD.embedded_run}
RUN_FLAGS = "arch layer epochs batch_size lr wd decay_epochs seed".split()


def network_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser with the flags that choose the network."""
    parser = Parser(docstring)
    add = parser.add_argument_group("network").add_argument
    add("--arch", default=None, help="None: that of the training, else regnet256Gf_1")
    weights = "a run, a file of any layout but shards, a release (seer_128gf), or random; default: the released weights"
    add("--pretrained", default="", help=weights)
    return parser


def load_chosen(args: argparse.Namespace) -> tuple[RegNet, EvalTransform]:
    """The frozen trunk that the flags choose, and the centre crops that it takes."""
    trained_with = flags_of_run(args.pretrained, CARD) if args.pretrained != "random" else {}
    names = {"arch": "arch", "image_size": size_flag(trained_with)}
    embedded = {"arch": "regnet_micro", "image_size": 32}
    take_from_run(args, trained_with, names, embedded if not args.data_path else DEFAULTS)
    network = load_pretrained(CARD, args.arch, args.pretrained)
    return network, frozen.eval_transform(CARD, args.image_size, network)


def get_args_parser() -> argparse.ArgumentParser:
    parser = network_parser(__doc__)
    add = add_data_flags(parser, batch_size=32)
    add("--num_labels", type=int, default=1000, help="outputs of the classifier")
    add("--layer", default="avgpool", choices=tuple(PLACES), help="whose map is classified")
    add = add_probe_flags(parser, epochs=28)
    add("--lr", type=float, default=0.01, help="learning rate for 256 images per step; scaled linearly")
    add("--decay_epochs", type=int, nargs="+", default=[8, 16, 24], help="epochs at which it falls to a tenth")
    add("--wd", type=float, default=5e-4, help="weight decay")
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default=".", help="for checkpoint.pth and log.txt; not the folder of the training run")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    embedded = EMBEDDED | {"num_labels": 12, "crop_scale": (0.6, 1.0), "epochs": 10, "decay_epochs": [6, 8]}
    embedded |= {"lr": 0.3, "output_dir": "runs/materials/linear"}
    return parse_evaluation(get_args_parser(), arguments, **embedded)


def eval_linear(args: argparse.Namespace) -> dict[str, float]:
    """Train and validate the classifier; loss and accuracies in percent after the last epoch."""
    device = frozen.start(args)
    network, transform = load_chosen(args)
    sources = frozen.labelled_sources(args, num_labels=args.num_labels)
    checksum = weights_checksum(network)
    features = PooledMap(network.to(device), args.layer)
    feature = features(torch.zeros(1, transform.in_chans, *[args.image_size] * 2, device=device))
    classifier = NormalisedClassifier(feature.shape[1:], args.num_labels).to(device)
    classifier = synchronize_batchnorm(classifier, device)
    training = frozen.LabelledTraining(args, CARD, classifier, features, sources, transform, device, drop_single=True)
    lr = args.lr * args.batch_size * distributed.get_world_size() / 256
    optimizer = torch.optim.SGD(classifier.parameters(), lr, momentum=0.9, weight_decay=args.wd, nesterov=True)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, args.decay_epochs)
    return training.train(optimizer, scheduler, checksum, "checkpoint.pth", flags=RUN_FLAGS)


class PooledMap:
    """Images (B, C, H, W) to the averages of a stage's map over a few places, (B, D, rows, columns).

    Args:
        layer: One of ``PLACES``; ``avgpool`` is that of the last stage, whatever its number.
    """

    def __init__(self, network: RegNet, layer: str):
        self.network, self.layer = network, layer
        last = f"res{len(network.trunk_output) + 1}"
        self.stage = last if layer == "avgpool" else layer
        if int(self.stage[3:]) > int(last[3:]):
            raise ValueError(f"--layer {layer}: the last stage of this network is {last}")

    def __call__(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.network.maps(images)[self.stage], PLACES[self.layer])


class NormalisedClassifier(LinearClassifier):
    """Batch norm of every channel, then one linear layer."""

    def __init__(self, shape: torch.Size, num_labels: int):
        super().__init__(shape.numel(), num_labels)
        self.bn = nn.BatchNorm2d(shape[0])

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(self.bn(features))


def main() -> None:
    distributed.run_script(eval_linear, parse_args)


if __name__ == "__main__":
    main()
