"""Weighted k-NN classification with the class tokens of a frozen encoder.

python eval_knn.py                                       # embedded materials, weights of the run in runs/materials
torchrun --nproc_per_node=8 eval_knn.py --model_name deit_small --data_path /path/to/imagenet
"""

import argparse
import functools
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from msn.flags import add_data_flags, finish, load_frozen, network_parser
from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.flags import add_knn_flags


def get_args_parser() -> argparse.ArgumentParser:
    parser = network_parser(__doc__)
    add_data_flags(parser)("--batch_size", type=int, default=128, help="images per process in one pass")
    return add_knn_flags(parser)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    return finish(parser, lambda: parser.parse_args(arguments))


eval_knn = functools.partial(frozen.eval_knn, load_frozen=load_frozen)


def main() -> None:
    distributed.run_script(eval_knn, parse_args)


if __name__ == "__main__":
    main()
