"""Weighted k-NN classification with the features of a frozen network.

    python eval_knn.py                                       # embedded materials, weights of the run in runs/materials
    torchrun --nproc_per_node=8 eval_knn.py --data_path /path/to/imagenet         # released SwAV, 800 epochs

An image's feature is the output of the trunk (2048 numbers for a ResNet-50), before the projection head.
"""

import argparse
import functools
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.flags import add_data_flags, add_knn_flags, parse_evaluation
from swav.evaluation import evaluation_parser, load_frozen
from swav.hub import CARD


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add_data_flags(parser)
    return add_knn_flags(parser, seed=31)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    return parse_evaluation(get_args_parser(), arguments, pretrained=CARD.embedded_run)


eval_knn = functools.partial(frozen.eval_knn, load_frozen=load_frozen)


def main() -> None:
    distributed.run_script(eval_knn, parse_args)


if __name__ == "__main__":
    main()
