"""Image retrieval on the revisited Oxford and Paris benchmarks (Caron et al. 2021, section 4.2, table 3).

    python eval_image_retrieval.py --data_path /path/to/revisited --dataset roxford5k --imsize 224 --multiscale 0
    torchrun --nproc_per_node=8 eval_image_retrieval.py --data_path /path/to/revisited --dataset rparis6k \\
        --imsize 512 --multiscale 1

``data_path`` holds ``<dataset>/gnd_<dataset>.pkl`` and ``<dataset>/jpg/*.jpg`` (Radenovic et al. 2018). Images are
ranked by the cosine similarity of the backbone's outputs. Without weights, ViT-S/16 takes those trained on Google
Landmarks. The lists are part of the protocol: an unreadable image is an error, or with ``--on_bad_image skip`` left out
(one of the database counts as junk), which the result says.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dino.augmentations import to_input
from dino.flags import choose_network, evaluation_parser, load_chosen
from dino.ground_truth import GroundTruth, read_ground_truth
from dino.hub import VITS16_LANDMARKS, fetch
from shared import distributed
from shared.evaluation.features import extract_features
from shared.evaluation.flags import add_process_flags
from shared.evaluation.frozen import bad_images_of
from shared.evaluation.ranking import average_precision
from shared.images.loading import LEFT_OUT, EvalDataset
from shared.images.sources import FileSource
from shared.networks.backbones import input_channels
from shared.run.flags import add_bad_image_flags, bool_flag

PRECISION_AT = (1, 5, 10)


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="folder that holds roxford5k/ and rparis6k/")
    add("--dataset", default="roxford5k", choices=("roxford5k", "rparis6k"))
    add("--multiscale", type=bool_flag, default=False, help="average the features over three scales")
    add("--imsize", type=int, default=224, help="longest side of an image in pixels; smaller ones stay")
    add_bad_image_flags(add, "error", "skip")
    add("--use_cuda", type=bool_flag, default=True, help="keep the features on the GPU")
    add_process_flags(parser)
    return parser


def eval_image_retrieval(args: argparse.Namespace) -> dict[str, "RetrievalResult"]:
    """Extract the features, rank, and score; results for the Medium and the Hard protocol, as shares."""
    device = distributed.init(args.dist_url, args.device)
    folder = Path(args.data_path) / args.dataset
    truth = read_ground_truth(folder, args.dataset)
    weights = args.pretrained_weights
    if not weights:
        choose_network(args)
        if (args.arch, args.patch_size) == ("vit_small", 16):
            weights = fetch(VITS16_LANDMARKS)
    model, _ = load_chosen(args, weights)
    in_chans = input_channels(model)
    if args.multiscale:
        model = MultiScale(model)
    model.to(device)

    (database, image_labels), (queries, query_labels) = (
        extract_features(
            model,
            retrieval_images(folder / "jpg", names, args, in_chans),
            device,
            batch_size=1,  # images differ in shape
            num_workers=args.num_workers,
            store_on=device if args.use_cuda else "cpu",
        )
        for names in (truth.images, truth.queries)
    )
    similarities = F.normalize(queries, dim=1) @ F.normalize(database, dim=1).t()
    ranks = similarities.argsort(dim=1, descending=True, stable=True).cpu().numpy()
    unread = [(labels == LEFT_OUT).nonzero().flatten().tolist() for labels in (image_labels, query_labels)]
    truth = truth.without(*unread)
    note = " (without {} images and {} queries)".format(*map(len, unread)) if any(unread) else ""
    results = {name: score_ranks(ranks, truth, name) for name in ("medium", "hard")}
    medium, hard = results["medium"], results["hard"]
    distributed.print_once(f">> {args.dataset}: mAP M: {100 * medium.mean_ap:.2f}, H: {100 * hard.mean_ap:.2f}{note}")
    distributed.print_once(
        f">> {args.dataset}: mP@k{list(PRECISION_AT)} "
        f"M: {np.round(100 * medium.mean_precision, 2)}, H: {np.round(100 * hard.mean_precision, 2)}{note}"
    )
    return results


def retrieval_images(folder: Path, names: list[str], args: argparse.Namespace, in_chans: int) -> EvalDataset:
    source = FileSource(str(folder), folder, [f"{name}.jpg" for name in names])
    transform = partial(shrink_and_normalize, imsize=args.imsize, in_chans=in_chans)
    return EvalDataset(source, transform, bad_images_of(args, source))


def shrink_and_normalize(pixels: np.ndarray, imsize: int, in_chans: int = 3) -> Tensor:
    """RGB pixels (H, W, 3), uint8, shrunk into a box of side ``imsize`` if larger, as input (C, H', W')."""
    image = Image.fromarray(pixels)
    image.thumbnail((imsize, imsize), Image.Resampling.LANCZOS)
    return to_input(image, in_chans)


class MultiScale(nn.Module):
    """Mean of a network's outputs at scales 1, 1/sqrt(2) and 1/2, of unit length."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to features (B, D); each row is normalised by itself."""
        total = self.network(images)
        for scale in (2**-0.5, 0.5):
            total = total + self.network(F.interpolate(images, scale_factor=scale, mode="bilinear"))
        return F.normalize(total / 3, dim=1)


class RetrievalResult:
    """Scores of a protocol.

    Attributes:
        ap: Average precision per query, shape (Q,); NaN for queries without positives.
        precision: Precision at 1, 5 and 10 per query, shape (Q, 3); NaN likewise.
    """

    def __init__(self, ap: np.ndarray, precision: np.ndarray):
        self.ap = ap
        self.precision = precision

    @property
    def mean_ap(self) -> float:
        """Over the queries that have positives."""
        return float(np.nanmean(self.ap))

    @property
    def mean_precision(self) -> np.ndarray:
        return np.nanmean(self.precision, axis=0)


def score_ranks(ranks: np.ndarray, truth: GroundTruth, protocol: str) -> RetrievalResult:
    """Score rankings of the database under the protocol ``medium`` or ``hard``.

    Medium counts easy and hard images as positives; Hard counts the hard ones and ignores the easy ones. Junk is
    ignored in both: taken out of the ranking before it is scored.

    Args:
        ranks: Database indices by descending similarity, shape (Q, N).

    Raises:
        ValueError: If no query has a positive.
    """
    positive_keys, ignored_keys = {
        "medium": (("easy", "hard"), ("junk",)),
        "hard": (("hard",), ("junk", "easy")),
    }[protocol]
    ap = np.full(len(ranks), np.nan)
    precision = np.full((len(ranks), len(PRECISION_AT)), np.nan)
    for q, lists in enumerate(truth.relevance):
        positives, ignored = ([i for key in keys for i in lists[key]] for keys in (positive_keys, ignored_keys))
        if not positives:
            continue
        ranking = ranks[q][~np.isin(ranks[q], ignored)]
        (places,) = np.nonzero(np.isin(ranking, positives))
        ap[q] = average_precision(places, len(positives))
        for j, k in enumerate(PRECISION_AT):
            k = min(k, places[-1] + 1)  # no further than the last positive
            precision[q, j] = (places < k).sum() / k
    if np.isnan(ap).all():
        raise ValueError(f"no query has a positive image in the {protocol} protocol")
    return RetrievalResult(ap, precision)


def main() -> None:
    distributed.run_script(eval_image_retrieval, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
