"""Weighted k-NN classification with the features of a frozen network.

    python eval_knn.py                                       # embedded digits, weights of the run in runs/digits
    torchrun --nproc_per_node=8 eval_knn.py --data_path /path/to/imagenet         # released SwAV, 800 epochs

An image's feature is the output of the trunk (2048 numbers for a ResNet-50), before the projection head. Each of the k
nearest train images, by cosine similarity s, votes for its class with weight exp(s / temperature).
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import distributed
from shared.evaluation import frozen
from shared.run import randomness
from swav import evaluation
from swav.hub import CARD, load_backbone


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation.evaluation_parser(__doc__)
    evaluation.add_data_flags(parser)
    add = frozen.add_vote_flags(parser)
    add("--batch_size", type=int, default=128, help="images per process")
    add("--seed", type=int, default=31, help="of the weights with --pretrained random")
    evaluation.add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    return evaluation.parse_and_check(get_args_parser(), arguments)


def eval_knn(args: argparse.Namespace) -> dict[int, tuple[float, float]] | None:
    """Extract the features and classify the val images; ``{k: (top-1, top-5)}`` in percent on rank 0."""
    device = distributed.init(args.dist_url, args.device)
    randomness.seed_everything(args.seed)
    sources = frozen.labelled_sources(args.data_path, args.val_path, args.allow_absolute_paths, nb_knn=max(args.nb_knn))
    network = load_backbone(args.arch, args.pretrained, args.allow_partial).to(device)
    transform = frozen.eval_transform(CARD, args.image_size, network)
    features = frozen.train_and_val_features(network, sources, transform, device, args.batch_size, args.workers)
    return frozen.print_knn(features, args.nb_knn, args.temperature, args.precision)


def main() -> None:
    with distributed.clean_exit():
        eval_knn(parse_args())
        distributed.barrier()


if __name__ == "__main__":
    main()
