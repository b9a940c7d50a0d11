"""Weighted k-NN classification with the features of a frozen backbone (Caron et al. 2021, section 4.1).

    python eval_knn.py                                       # embedded materials, weights of the run in runs/materials
    torchrun --nproc_per_node=8 eval_knn.py --arch vit_small --patch_size 16 --data_path /path/to/imagenet
                                                             # released ViT-S/16: 74.5 at k = 20

An image's feature is the backbone's output. Each of the k nearest train images, by cosine similarity s, votes for its
class with weight exp(s / temperature).
"""

import argparse
import functools
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from dino.flags import evaluation_parser, load_frozen
from dino.hub import CARD
from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.flags import add_data_flags, add_knn_flags, parse_evaluation


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add_data_flags(parser)
    return add_knn_flags(parser)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    return parse_evaluation(get_args_parser(), arguments, pretrained_weights=CARD.embedded_run)


eval_knn = functools.partial(frozen.eval_knn, load_frozen=load_frozen)


def main() -> None:
    distributed.run_script(eval_knn, parse_args)


if __name__ == "__main__":
    main()
