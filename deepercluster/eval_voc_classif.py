"""Multi-label classification on Pascal VOC 2007, with or without fine-tuning (Caron et al. 2019, section 5.2).

    python eval_voc_classif.py --data_path /path/to/VOCdevkit/VOC2007 --split trainval --pretrained ours --sobel 1 \\
        --fc6_8 1 --wd 1e-5 --stepsize 20000                # only the fully connected layers learn; published: 79.7
    python eval_voc_classif.py --data_path /path/to/VOCdevkit/VOC2007 --split trainval --pretrained ours --sobel 1 \\
        --fc6_8 0 --wd 1e-4                                 # all layers learn; published: 84.3

The fully connected layers start afresh, and the score of an image is the sum over ten crops. The published numbers are
means over five seeds. An unreadable image is an error, or with ``--on_bad_image skip`` has no score.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from torch import nn

from deepercluster.eval_linear import add_network_flags, load_frozen
from deepercluster.eval_pretrain import BIAS
from deepercluster.hub import CARD
from shared import distributed
from shared.evaluation.linear import start_afresh
from shared.evaluation.voc import CLASSES, add_voc_flags, classify_voc, open_splits
from shared.images.views import ViewRecipe
from shared.run import randomness
from shared.run.flags import AnyDashParser


def get_args_parser() -> argparse.ArgumentParser:
    parser = AnyDashParser(__doc__)
    add_network_flags(parser)
    add_voc_flags(parser, "--data_path", nit=150_000, stepsize=10_000, seed=1993)
    return parser


def eval_voc_classif(args: argparse.Namespace) -> dict[str, float]:
    """Train the classifier; mean average precision in percent on the training and on the test split."""
    device = distributed.init(device=args.device)
    randomness.seed_everything(args.seed)
    images = open_splits(args.data_path, args.split, "--data_path")
    network = load_frozen(args, relu=True)
    start_afresh(network.body.classifier, BIAS)
    network.pred_layer = nn.Linear(network.dim, len(CLASSES))
    start_afresh(network.pred_layer, BIAS)
    network.body.features.requires_grad_(not args.fc6_8)
    network = network.to(device)
    parameters = [p for p in network.parameters() if p.requires_grad]
    recipe = ViewRecipe(args.image_size, (0.08, 1.0), interpolation="bilinear")
    return classify_voc(network, network.body.features, parameters, images, recipe, args, device, CARD)


def main() -> None:
    distributed.run_script(eval_voc_classif, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
