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

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from torch import nn

from deepcluster.convnets import ClusterNetwork
from deepcluster.flags import MODEL_HELP
from deepcluster.hub import CARD, load_network
from shared import distributed
from shared.evaluation.linear import start_afresh
from shared.evaluation.voc import CLASSES, add_voc_flags, classify_voc, open_splits
from shared.images.views import ViewRecipe
from shared.run import randomness
from shared.run.flags import Parser, bool_flag

BIAS = 0.1  # of the layers that start afresh


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default="", help=MODEL_HELP)
    add("--train_batchnorm", type=bool_flag, default=False, help="with --fc6_8, batch norms learn scale and shift")
    add("--min_scale", type=float, default=0.1, help="least area of the random crops")
    add("--max_scale", type=float, default=0.5, help="largest area of the random crops")
    add_voc_flags(parser, "--vocdir", nit=80_000, stepsize=5000, seed=31)
    return parser


def eval_voc_classif(args: argparse.Namespace) -> dict[str, float]:
    """Train the classifier; mean average precision in percent on the training and on the test split."""
    device = distributed.init(device=args.device)
    randomness.seed_everything(args.seed)
    splits = open_splits(args.vocdir, args.split, "--vocdir")
    network = load_network(args.model, keep_top_layer=False).to(device)
    recipe = ViewRecipe(network.img_size, (args.min_scale, args.max_scale), ratio=(1.0, 1.0), interpolation="bilinear")
    parameters = start_classifier(network, args.fc6_8, args.train_batchnorm)
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
    start_afresh(network.classifier, BIAS)
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
