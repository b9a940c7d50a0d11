"""Weighted k-NN classification with the features of a frozen network.

    python eval_knn.py                                       # embedded digits, weights of the run in runs/digits
    torchrun --nproc_per_node=8 eval_knn.py --data_path /path/to/imagenet         # released SwAV, 800 epochs

An image's feature is the output of the trunk (2048 numbers for a ResNet-50), before the projection head. Each of the k
nearest train images, by cosine similarity s, votes for its class with weight exp(s / temperature).
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import distributed
from shared.evaluation.features import extract_features
from shared.evaluation.knn import knn_accuracies
from shared.images.loading import EvalDataset
from shared.run import randomness
from swav.evaluation import (
    add_data_flags,
    add_process_flags,
    eval_transform,
    evaluation_parser,
    labelled_sources,
    parse_and_check,
)
from swav.pretrained import load_backbone


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add_data_flags(parser)
    add = parser.add_argument_group("vote").add_argument
    add("--batch_size", type=int, default=128, help="images per process")
    add("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours; 20 is usually best")
    add("--temperature", type=float, default=0.07, help="divides the similarities")
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="of the similarities")
    add("--seed", type=int, default=31, help="of the weights with --pretrained random")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    return parse_and_check(get_args_parser(), arguments)


def eval_knn(args: argparse.Namespace) -> dict[int, tuple[float, float]] | None:
    """Extract the features and classify the val images; ``{k: (top-1, top-5)}`` in percent on rank 0."""
    device = distributed.init(args.dist_url, args.device)
    randomness.seed_everything(args.seed)
    sources = labelled_sources(args.data_path, args.val_path, args.allow_absolute_paths)
    if max(args.nb_knn) > len(sources[0]):
        raise ValueError(f"--nb_knn {max(args.nb_knn)} is more than the {len(sources[0])} images of {sources[0].name}")
    network = load_backbone(args.arch, args.pretrained, args.allow_partial).to(device)
    transform = eval_transform(args.image_size, network)
    features_and_labels: list[Tensor] = []
    for source in sources:
        distributed.print_once(source.describe())
        dataset = EvalDataset(source, transform)
        features, labels = extract_features(network, dataset, device, args.batch_size, args.workers)
        features_and_labels += [F.normalize(features, dim=1), labels]
    if not distributed.is_main_process():
        return None
    with torch.inference_mode():
        accuracies = knn_accuracies(*features_and_labels, args.nb_knn, args.temperature, precision=args.precision)
    for k, (top1, top5) in accuracies.items():
        print(f"{k}-NN classifier result: Top1: {top1:.2f}, Top5: {top5:.2f}", flush=True)
    return accuracies


def main() -> None:
    with distributed.clean_exit():
        eval_knn(parse_args())
        distributed.barrier()


if __name__ == "__main__":
    main()
