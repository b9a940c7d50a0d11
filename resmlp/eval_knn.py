"""Weighted k-NN classification with the features of a frozen ResMLP.

    python eval_knn.py                                       # embedded digits, weights of the run in runs/digits
    torchrun --nproc_per_node=8 eval_knn.py --pretrained_weights resmlp_24_dino --data_path /path/to/imagenet
                                                             # released ResMLP-S24, trained with DINO: 69.4

An image's feature is the mean of its patches, D numbers. Each of the k nearest train images, by cosine similarity s,
votes for its class with weight exp(s / temperature).
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resmlp.flags import add_data_flags, add_process_flags, evaluation_parser, frozen_network, parse_evaluation
from shared import distributed
from shared.evaluation import frozen


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add_data_flags(parser)
    frozen.add_vote_flags(parser)
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    return parse_evaluation(get_args_parser(), arguments, {"batch_size_per_gpu": 1})


def eval_knn(args: argparse.Namespace) -> dict[int, tuple[float, float]] | None:
    """Extract the features and classify the val images; ``{k: (top-1, top-5)}`` in percent on rank 0."""
    device = distributed.init(args.dist_url, args.device)
    sources = frozen.labelled_sources(args.data_path, args.val_path, args.allow_absolute_paths, nb_knn=max(args.nb_knn))
    network, transform = frozen_network(args)
    features = frozen.train_and_val_features(
        network.to(device), sources, transform, device, args.batch_size_per_gpu, args.num_workers
    )
    return frozen.print_knn(features, args.nb_knn, args.temperature, args.precision)


def main() -> None:
    with distributed.clean_exit():
        eval_knn(parse_args())
        distributed.barrier()


if __name__ == "__main__":
    main()
