"""Weighted k-NN classification with the class tokens of a frozen encoder.

    python eval_knn.py                                       # embedded digits, weights of the run in runs/digits
    torchrun --nproc_per_node=8 eval_knn.py --model_name deit_small --data_path /path/to/imagenet

Each of the k nearest train images, by cosine similarity s, votes for its class with weight exp(s / temperature).
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from msn.augmentations import MEAN, STD
from msn.flags import add_data_flags, add_process_flags, finish, labelled_sources, load_chosen_encoder, network_parser
from shared import distributed
from shared.evaluation.features import extract_features
from shared.evaluation.knn import knn_accuracies
from shared.images.loading import EvalDataset, EvalTransform
from shared.networks.backbones import input_channels


def get_args_parser() -> argparse.ArgumentParser:
    parser = network_parser(__doc__)
    add_data_flags(parser)
    add = parser.add_argument_group("vote").add_argument
    add("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours")
    add("--temperature", type=float, default=0.07, help="divides the similarities")
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="of the similarities")
    add("--batch_size", type=int, default=128, help="images per process in one pass")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    return finish(parser, lambda: parser.parse_args(arguments))


def eval_knn(args: argparse.Namespace) -> dict[int, tuple[float, float]] | None:
    """Extract the features and classify the val images; ``{k: (top-1, top-5)}`` in percent on rank 0."""
    device = distributed.init(args.dist_url, args.device)
    sources = labelled_sources(args)
    if max(args.nb_knn) > len(sources[0]):
        raise ValueError(f"--nb_knn {max(args.nb_knn)} is more than the {len(sources[0])} images of {sources[0].name}")
    encoder = load_chosen_encoder(args)
    encoder.to(device)
    size = args.image_size
    transform = EvalTransform(round(size * 256 / 224), size, MEAN, STD, input_channels(encoder), "bilinear")
    found: list[torch.Tensor] = []
    for source in sources:
        distributed.print_once(source.describe())
        dataset = EvalDataset(source, transform)
        features, labels = extract_features(encoder, dataset, device, args.batch_size, args.num_workers)
        found += [F.normalize(features, dim=1), labels]
    if not distributed.is_main_process():
        return None
    accuracies = knn_accuracies(*found, args.nb_knn, args.temperature, precision=args.precision)
    for k, (top1, top5) in accuracies.items():
        print(f"{k}-NN classifier result: Top1: {top1}, Top5: {top5}", flush=True)
    return accuracies


def main() -> None:
    with distributed.clean_exit():
        eval_knn(parse_args())
        distributed.barrier()


if __name__ == "__main__":
    main()
