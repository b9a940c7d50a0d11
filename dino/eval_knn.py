"""Weighted k-NN classification with the features of a frozen backbone (Caron et al. 2021, section 4.1).

    python eval_knn.py                                       # embedded digits, weights of the run in runs/digits
    torchrun --nproc_per_node=8 eval_knn.py --arch vit_small --patch_size 16 --data_path /path/to/imagenet
                                                             # released ViT-S/16: 74.5 at k = 20

An image's feature is the backbone's output. Each of the k nearest train images, by cosine similarity s, votes for its
class with weight exp(s / temperature).
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dino.augmentations import MEAN, STD
from dino.flags import add_data_flags, add_process_flags, bool_flag, evaluation_parser, set_embedded_data_defaults
from dino.pretrained import load_pretrained
from shared import distributed
from shared.evaluation.features import extract_features
from shared.evaluation.knn import knn_accuracies
from shared.images.labelled import open_labelled
from shared.images.loading import EvalDataset, EvalTransform
from shared.networks.backbones import input_channels
from shared.networks.weights import safe_load

FEATURE_FILES = ("trainfeat.pth", "testfeat.pth", "trainlabels.pth", "testlabels.pth")


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add = add_data_flags(parser)
    add("--image_size", type=int, default=224, help="side of the centre crop in pixels, of 8/7 the short side")
    add("--batch_size_per_gpu", type=int, default=128, help="images per process")
    add("--dump_features", default=None, help="folder to write the features and labels to")
    add("--load_features", default=None, help="folder to read them from instead of extracting them")

    add = parser.add_argument_group("vote").add_argument
    add("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours; 20 is usually best")
    add("--temperature", type=float, default=0.07, help="divides the similarities")
    add("--use_cuda", type=bool_flag, default=True, help="keep the features on the GPU")
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="of the similarities")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    args = parser.parse_args(arguments)
    if args.data_path is None:
        set_embedded_data_defaults(parser)
        args = parser.parse_args(arguments)
    return args


def eval_knn(args: argparse.Namespace) -> dict[int, tuple[float, float]] | None:
    """Extract or load the features and classify the val images; ``{k: (top-1, top-5)}`` in percent on rank 0."""
    device = distributed.init(args.dist_url, args.device)
    if args.load_features:
        features = read_features(Path(args.load_features), device if args.use_cuda else "cpu")
    else:
        features = extract_train_and_val(args, device)
    if not distributed.is_main_process():
        return None
    if args.dump_features:
        write_features(Path(args.dump_features), features)
    print("Features are ready! Start the k-NN classification.", flush=True)
    accuracies = knn_accuracies(*features, args.nb_knn, args.temperature, precision=args.precision)
    for k, (top1, top5) in accuracies.items():
        print(f"{k}-NN classifier result: Top1: {top1}, Top5: {top5}", flush=True)
    return accuracies


def extract_train_and_val(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised train features, train labels, val features, val labels."""
    sources = open_labelled(args.data_path, args.val_path, args.allow_absolute_paths)
    if max(args.nb_knn) > len(sources[0]):
        raise ValueError(f"--nb_knn {max(args.nb_knn)} is more than the {len(sources[0])} images of {sources[0].name}")
    backbone, _ = load_pretrained(
        args.arch, args.patch_size, args.pretrained_weights, args.checkpoint_key, args.allow_partial
    )
    backbone.to(device)
    transform = eval_transform(args.image_size, backbone)
    found = []
    for source in sources:
        distributed.print_once(source.describe())
        features, labels = extract_features(
            backbone,
            EvalDataset(source, transform),
            device,
            args.batch_size_per_gpu,
            args.num_workers,
            store_on=device if args.use_cuda else "cpu",
        )
        found += [F.normalize(features, dim=1), labels]
    train_features, train_labels, val_features, val_labels = found
    return train_features, train_labels, val_features, val_labels


def eval_transform(image_size: int, backbone: nn.Module) -> EvalTransform:
    """Resize (256 for a crop of 224), crop the centre, normalise, for the channels that the backbone takes."""
    return EvalTransform(round(image_size * 256 / 224), image_size, MEAN, STD, input_channels(backbone))


def write_features(folder: Path, features: tuple[Tensor, ...]) -> None:
    """Train features, val features, train labels, val labels, one file each."""
    folder.mkdir(parents=True, exist_ok=True)
    train_features, train_labels, val_features, val_labels = features
    for name, tensor in zip(FEATURE_FILES, (train_features, val_features, train_labels, val_labels), strict=True):
        torch.save(tensor.cpu(), folder / name)


def read_features(folder: Path, device: torch.device | str) -> tuple[Tensor, ...]:
    """What :func:`write_features` wrote."""
    missing = [name for name in FEATURE_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"--load_features {folder}: no {', '.join(missing)} in it")
    train_features, val_features, train_labels, val_labels = (
        safe_load(folder / name, map_location=device) for name in FEATURE_FILES
    )
    return train_features, train_labels.long(), val_features, val_labels.long()


def main() -> None:
    with distributed.clean_exit():
        eval_knn(parse_args())
        distributed.barrier()


if __name__ == "__main__":
    main()
