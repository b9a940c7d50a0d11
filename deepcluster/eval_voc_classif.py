"""Multi-label classification on Pascal VOC 2007, with or without fine-tuning (Caron et al. 2018, section 4.3).

    python eval_voc_classif.py --vocdir /path/to/VOCdevkit/VOC2007 --split trainval --model checkpoint.pth.tar \\
        --fc6_8 1 --train_batchnorm 1                       # released AlexNet: 72.0 mAP

The fully connected layers start afresh. Crops are small parts of the images, and the score of an image is the sum over
ten crops. The lists are part of the protocol: an unreadable image is an error, or with ``--on_bad_image skip`` has no
score (in training another one takes its place), which the results say.
"""

import argparse
import sys
from pathlib import Path

from torch import nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepcluster.convnets import ClusterNetwork
from deepcluster.flags import MODEL_HELP
from deepcluster.hub import CARD, load_network
from shared import distributed
from shared.evaluation.flags import add_process_flags
from shared.evaluation.voc import CLASSES, TEST_SPLIT, VOCImages, classify_voc
from shared.images.views import ViewRecipe
from shared.run import randomness
from shared.run.flags import Parser, add_bad_image_flags

BIAS = 0.1  # of the layers that start afresh


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--vocdir", default="", help="folder VOC2007, with ImageSets/Main, Annotations and JPEGImages")
    add("--split", default="train", choices=tuple(TEST_SPLIT), help="images to learn from; tested on val or test")
    add("--model", default="", help=MODEL_HELP)
    add("--nit", type=int, default=80000, help="training steps")
    add("--fc6_8", type=int, default=1, choices=(0, 1), help="1: the convolutional part stays as it is")
    add("--train_batchnorm", type=int, default=0, choices=(0, 1), help="1: but its batch norms learn scale and shift")
    add("--eval_random_crops", type=int, default=1, choices=(0, 1), help="1: ten random crops; 0: corners and centre")
    add("--stepsize", type=int, default=5000, help="steps after which the learning rate is halved")
    add("--lr", type=float, default=0.003, help="learning rate at the start")
    add("--wd", type=float, default=1e-6, help="weight decay (the value itself)")
    add("--min_scale", type=float, default=0.1, help="least area of the random crops")
    add("--max_scale", type=float, default=0.5, help="largest area of the random crops")
    add("--seed", type=int, default=31)
    add_bad_image_flags(add, "error", "skip")
    add_process_flags(parser, launcher=False, num_workers=4)
    return parser


def eval_voc_classif(args: argparse.Namespace) -> dict[str, float]:
    """Train the classifier; mean average precision in percent on the training and on the test split."""
    device = distributed.init(device=args.device)
    randomness.seed_everything(args.seed)
    splits = {split: VOCImages(Path(args.vocdir), split) for split in (args.split, TEST_SPLIT[args.split])}
    network = load_network(args.model, keep_top_layer=False).to(device)
    recipe = ViewRecipe(network.img_size, (args.min_scale, args.max_scale), ratio=(1.0, 1.0), interpolation="bilinear")
    parameters = start_classifier(network, bool(args.fc6_8), bool(args.train_batchnorm))
    return classify_voc(network, network.features, parameters, splits, recipe, args, device, CARD)


def start_classifier(network: ClusterNetwork, freeze: bool, train_batchnorm: bool) -> list[nn.Parameter]:
    """Start the fully connected layers afresh, with a top layer of 20 outputs, and return what will learn.

    Args:
        freeze: Leave the convolutional part as it is.
        train_batchnorm: But let its batch norms learn scale and shift.
    """
    device = next(network.features.parameters()).device
    network.top_layer = nn.Linear(network.dim, len(CLASSES), device=device)
    nn.init.constant_(network.top_layer.bias, BIAS)
    for layer in network.classifier:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, BIAS)
    network.features.requires_grad_(not freeze)
    if train_batchnorm:
        for layer in network.features.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.requires_grad_(True)
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def main() -> None:
    distributed.run_script(eval_voc_classif, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
