"""Weighted k-NN classification with the features of a frozen ResMLP.

    python eval_knn.py                                       # embedded materials, weights of the run in runs/materials
    torchrun --nproc_per_node=8 eval_knn.py --pretrained_weights resmlp_24_dino --data_path /path/to/imagenet
                                                             # released ResMLP-S24, trained with DINO: 69.4

An image's feature is the mean of its patches, D numbers.
"""

import argparse
import functools
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from resmlp.flags import add_data_flags, evaluation_parser, load_frozen, parse_evaluation
from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.flags import add_knn_flags


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add_data_flags(parser)
    return add_knn_flags(parser)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    return parse_evaluation(get_args_parser(), arguments)


eval_knn = functools.partial(frozen.eval_knn, load_frozen=load_frozen)


def main() -> None:
    distributed.run_script(eval_knn, parse_args)


if __name__ == "__main__":
    main()
