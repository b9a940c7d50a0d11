"""Linear classification on the frozen features of a ResMLP.

    python eval_linear.py                                    # embedded materials, weights of the run in runs/materials
    torchrun --nproc_per_node=8 eval_linear.py --pretrained_weights resmlp_24_dino --data_path /path/to/imagenet \\
        --output_dir /path/to/linear                         # released ResMLP-S24, trained with DINO: 72.8

A linear layer learns on the mean of the patches, with random crops and flips. The result is the accuracy after the last
epoch. Running the same command again resumes.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch

from resmlp.flags import add_data_flags, evaluation_parser, load_frozen, parse_evaluation
from resmlp.hub import CARD
from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.flags import add_probe_flags, add_process_flags
from shared.evaluation.linear import LinearClassifier
from shared.networks.weights import weights_checksum

# A run that is resumed must have these as they were.
RUN_FLAGS = "epochs batch_size lr seed".split()


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add_data_flags(parser)
    add = add_probe_flags(parser, epochs=100)
    add("--lr", type=float, default=0.001, help="learning rate at the start for 256 images per step; scaled linearly")
    add("--output_dir", default=".", help="for linear.pth and linear_log.txt")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    embedded = {"crop_scale": (0.6, 1.0), "lr": 0.1, "epochs": 20, "output_dir": "runs/materials"}
    return parse_evaluation(get_args_parser(), arguments, **embedded)


def eval_linear(args: argparse.Namespace) -> dict[str, float]:
    """Train and validate the classifier; loss and accuracies in percent after the last epoch."""
    device = frozen.start(args)
    network, transform = load_frozen(args)
    sources = frozen.labelled_sources(args)

    # linear classifier
    network.to(device)
    classifier = LinearClassifier(network.embed_dim, len(sources[0].classes)).to(device)
    crops = {"interpolation": "bicubic"}
    training = frozen.LabelledTraining(args, CARD, classifier, network, sources, transform, device, **crops)

    # optimiser, schedule, epochs
    lr = args.lr * args.batch_size * distributed.get_world_size() / 256
    optimizer = torch.optim.SGD(classifier.parameters(), lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    names = {"weights_key": "classifier", "prefix": "", "origin_key": "network"}
    checksum = weights_checksum(network)
    return training.train(optimizer, scheduler, checksum, "linear.pth", "linear_log.txt", RUN_FLAGS, **names)


def main() -> None:
    distributed.run_script(eval_linear, parse_args)


if __name__ == "__main__":
    main()
