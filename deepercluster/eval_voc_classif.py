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

from torch import nn

from deepercluster.eval_linear import add_network_flags, load_frozen
from deepercluster.eval_pretrain import BIAS, start_classifier
from deepercluster.hub import CARD
from shared import distributed
from shared.evaluation.flags import add_process_flags
from shared.evaluation.voc import CLASSES, TEST_SPLIT, VOCImages, classify_voc
from shared.images.views import ViewRecipe
from shared.run import randomness
from shared.run.flags import AnyDashParser, add_bad_image_flags, bool_flag


def get_args_parser() -> argparse.ArgumentParser:
    parser = AnyDashParser(__doc__)
    add = parser.add_argument
    add("--data_path", default="", help="folder VOC2007, with ImageSets/Main, Annotations and JPEGImages")
    add("--split", default="train", choices=tuple(TEST_SPLIT), help="images to learn from; tested on val or test")
    add("--pretrained", default="", help="a run, a file or a release")
    add_network_flags(add)
    add("--fc6_8", type=bool_flag, default=True, help="the convolutional part stays as it is")
    add("--eval_random_crops", type=bool_flag, default=True, help="ten random crops; false: corners and centre")
    add("--nit", type=int, default=150_000, help="training steps")
    add("--stepsize", type=int, default=10_000, help="steps after which the learning rate is halved")
    add("--lr", type=float, default=0.003, help="learning rate at the start")
    add("--wd", type=float, default=1e-6, help="weight decay")
    add("--seed", type=int, default=1993)
    add_bad_image_flags(add, "error", "skip")
    add_process_flags(parser, launcher=False, num_workers=4)
    return parser


def eval_voc_classif(args: argparse.Namespace) -> dict[str, float]:
    """Train the classifier; mean average precision in percent on the training and on the test split."""
    device = distributed.init(device=args.device)
    randomness.seed_everything(args.seed)
    folder, splits = Path(args.data_path), (args.split, TEST_SPLIT[args.split])
    images = {split: VOCImages(folder, split, "--data_path") for split in splits}
    network = load_frozen(args, relu=True)
    start_classifier(network)
    network.pred_layer = nn.Linear(network.dim, len(CLASSES))
    nn.init.normal_(network.pred_layer.weight, std=0.01)
    nn.init.constant_(network.pred_layer.bias, BIAS)
    network.body.features.requires_grad_(not args.fc6_8)
    network = network.to(device)
    parameters = [p for p in network.parameters() if p.requires_grad]
    recipe = ViewRecipe(args.image_size, (0.08, 1.0), interpolation="bilinear")
    return classify_voc(network, network.body.features, parameters, images, recipe, args, device, CARD)


def main() -> None:
    distributed.run_script(eval_voc_classif, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
