"""Classify images by their soft nearest neighbours among the labelled ones; nothing is trained.

    python snn_eval.py                                     # embedded materials, weights of the run in runs/materials
    python snn_eval.py --pretrained paws_imgnt_10percent_300ep --data_path /path/to/imagenet \\
        --subset_path imagenet_subsets                                              # released PAWS: 73.1

The supports are the labelled images of the training, centre crops without augmentation. Their labels are not smoothed.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from paws import flags
from paws.evaluation import eval_transform, open_classifier, validation_of
from shared import distributed
from shared.evaluation.flags import add_shared_classes_flag


def get_args_parser() -> argparse.ArgumentParser:
    parser = flags.new_parser(__doc__)
    add = flags.add_label_flags(parser)
    add_shared_classes_flag(add)
    # with their names in the official script
    add("--dataset", "--dataset_name", default=None, choices=flags.DATASETS, help="as for main.py")
    add("--data_seed", "--split_seed", type=split_number, default=None, help="as for main.py")
    flags.add_evaluation_flags(parser, batch_size=64)
    return parser


def split_number(text: str) -> int:
    """``152`` or ``152.0``, as the official script would have it."""
    return int(float(text))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    return flags.parse_with_embedded_defaults(get_args_parser(), arguments, flags.ON_EMBEDDED, flags.WEIGHTS)


def snn_eval(args: argparse.Namespace) -> tuple[float, float]:
    """Top-1 and top-5 in percent, the same on every process."""
    encoder, classifier = open_classifier(args)
    validation = validation_of(args, classifier.images)
    dataset = validation.dataset(eval_transform(classifier.recipe, encoder))
    top1, top5 = validation.top_k(*classifier.classify(encoder, dataset))
    distributed.print_once(f"{validation.describe()}: top-1 {top1:.2f} %, top-5 {top5:.2f} %")
    return top1, top5


def main() -> None:
    distributed.run_script(snn_eval, parse_args)


if __name__ == "__main__":
    main()
