"""Weighted k-NN classification with the class tokens of a frozen encoder.

    python eval_knn.py                                       # embedded digits, weights of the run in runs/digits
    torchrun --nproc_per_node=8 eval_knn.py --model_name deit_small --data_path /path/to/imagenet

Each of the k nearest train images, by cosine similarity s, votes for its class with weight exp(s / temperature).
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from msn.flags import add_data_flags, add_process_flags, finish, load_chosen_encoder, network_parser
from msn.hub import CARD
from shared import distributed
from shared.evaluation import frozen


def get_args_parser() -> argparse.ArgumentParser:
    parser = network_parser(__doc__)
    add_data_flags(parser)
    add = frozen.add_vote_flags(parser)
    add("--batch_size", type=int, default=128, help="images per process in one pass")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    return finish(parser, lambda: parser.parse_args(arguments))


def eval_knn(args: argparse.Namespace) -> dict[int, tuple[float, float]] | None:
    """Extract the features and classify the val images; ``{k: (top-1, top-5)}`` in percent on rank 0."""
    device = distributed.init(args.dist_url, args.device)
    sources = frozen.labelled_sources(args.data_path, args.val_path, args.allow_absolute_paths, nb_knn=max(args.nb_knn))
    encoder = load_chosen_encoder(args).to(device)
    transform = frozen.eval_transform(CARD, args.image_size, encoder)
    features = frozen.train_and_val_features(encoder, sources, transform, device, args.batch_size, args.num_workers)
    return frozen.print_knn(features, args.nb_knn, args.temperature, args.precision)


def main() -> None:
    with distributed.clean_exit():
        eval_knn(parse_args())
        distributed.barrier()


if __name__ == "__main__":
    main()
