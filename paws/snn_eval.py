"""Classify images by their soft nearest neighbours among the labelled ones; nothing is trained.

    python snn_eval.py                                     # embedded digits, weights of the run in runs/digits
    python snn_eval.py --pretrained paws_imgnt_10percent_300ep --data_path /path/to/imagenet \\
        --subset_path imagenet_subsets                                              # released PAWS: 73.1

The supports are the labelled images of the training, centre crops without augmentation. Their labels are not smoothed.
"""

import argparse
import sys
from pathlib import Path

import torch

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paws import training_flags
from paws.augmentations import choose_recipe
from paws.evaluation import add_process_flags, classify, open_validation, print_accuracies, representations
from paws.pretrained import RUN_ON_DIGITS, load_encoder
from paws.training_data import open_images
from shared import distributed
from shared.images.loading import default_num_workers

EMBEDDED_DATA_DEFAULTS = {
    "dataset": "digits",
    "labels_per_class": 4,
    "model_name": "wide_resnet10w1",
    "pretrained": RUN_ON_DIGITS,
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = training_flags.new_parser(__doc__)
    add = training_flags.add_label_flags(parser)
    # the official script has dashes and a name of its own
    add("--unlabeled_frac", "--unlabeled-frac", type=float, default=0.9, help="as for main.py")
    add("--subset_path", "--subset-path", default=None, help="as for main.py")
    add("--root_path", "--root-path", default=None, help="as for main.py")
    add("--image_folder", "--image-folder", default="", help="as for main.py")
    add("--dataset", "--dataset-name", default="imagenet", choices=training_flags.DATASETS, help="as for main.py")
    add("--data_seed", "--split-seed", type=split_number, default=None, help="as for main.py")
    add = parser.add_argument_group("criterion").add_argument
    add("--temperature", type=float, default=0.1, help="of the softmax over similarities")
    add = parser.add_argument_group("meta").add_argument
    add("--model_name", "--model-name", default="resnet50", help="as for main.py")
    add("--pretrained", default=None, help="checkpoint of a training, or the name of a release")
    add("--use_pred", "--use-pred", action="store_true", help="compare the outputs of the prediction head")
    add("--batch_size", type=int, default=64, help="images per process")
    training_flags.add_device_flag(parser)
    add_process_flags(parser)
    return parser


def split_number(text: str) -> int:
    """``152`` or ``152.0``, as the official script would have it."""
    return int(float(text))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    args = training_flags.parse_with_embedded_defaults(parser, arguments, EMBEDDED_DATA_DEFAULTS)
    if args.pretrained is None:
        parser.error("--pretrained is missing: a checkpoint of main.py, or the name of a release")
    return args


def snn_eval(args: argparse.Namespace) -> tuple[float, float]:
    """Top-1 and top-5 in percent, the same on every process."""
    device = distributed.init(args.dist_url, args.device)
    images = open_images(args)
    validation = open_validation(images, args.data_path, args.val_path, args.allow_absolute_paths)
    recipe = choose_recipe(args.dataset, args.normalize, args.image_size)
    encoder = load_encoder(args.model_name, args.pretrained, args.use_pred).to(device)
    num_workers = default_num_workers() if args.num_workers is None else args.num_workers
    supports, queries = (
        representations(
            encoder,
            source,
            rows,
            recipe,
            device,
            use_pred=args.use_pred,
            batch_size=args.batch_size,
            num_workers=num_workers,
        )
        for source, rows in ((images.source, images.labelled), (validation.source, validation.rows))
    )
    labels = torch.from_numpy(images.labels[images.labelled]).to(device)
    probabilities = classify(queries, supports, labels, len(images.classes), args.temperature)
    return print_accuracies(validation.describe(), probabilities, validation.labels)


def main() -> None:
    with distributed.clean_exit():
        snn_eval(parse_args())


if __name__ == "__main__":
    main()
