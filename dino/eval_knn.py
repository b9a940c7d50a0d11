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

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dino.flags import EMBEDDED_DATA_DEFAULTS, add_data_flags, add_process_flags, evaluation_parser, load_chosen
from dino.hub import CARD
from shared import distributed
from shared.evaluation import frozen
from shared.run.flags import bool_flag, parse_with_embedded_defaults


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add = add_data_flags(parser)
    add("--image_size", type=int, default=224, help="side of the centre crop in pixels, of 8/7 the short side")
    add("--batch_size_per_gpu", type=int, default=128, help="images per process")
    add("--dump_features", default=None, help="folder to write the features and labels to")
    add("--load_features", default=None, help="folder to read them from instead of extracting them")

    add = frozen.add_vote_flags(parser)
    add("--use_cuda", type=bool_flag, default=True, help="keep the features on the GPU")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    return parse_with_embedded_defaults(get_args_parser(), arguments, EMBEDDED_DATA_DEFAULTS, {})


def eval_knn(args: argparse.Namespace) -> dict[int, tuple[float, float]] | None:
    """Extract or load the features and classify the val images; ``{k: (top-1, top-5)}`` in percent on rank 0."""
    device = distributed.init(args.dist_url, args.device)
    store_on = device if args.use_cuda else "cpu"
    if args.load_features:
        features = frozen.read_features(Path(args.load_features), store_on)
    else:
        paths = (args.data_path, args.val_path, args.allow_absolute_paths)
        sources = frozen.labelled_sources(*paths, nb_knn=max(args.nb_knn))
        backbone, _ = load_chosen(args)
        transform = frozen.eval_transform(CARD, args.image_size, backbone.to(device))
        features = frozen.train_and_val_features(
            backbone, sources, transform, device, args.batch_size_per_gpu, args.num_workers, store_on
        )
    if args.dump_features and distributed.is_main_process():
        frozen.write_features(Path(args.dump_features), features)
    distributed.print_once("Features are ready! Start the k-NN classification.")
    return frozen.print_knn(features, args.nb_knn, args.temperature, args.precision)


def main() -> None:
    with distributed.clean_exit():
        eval_knn(parse_args())
        distributed.barrier()


if __name__ == "__main__":
    main()
