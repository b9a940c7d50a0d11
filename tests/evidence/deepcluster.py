"""The small experiments behind deepcluster/README.md: the paper's claims on the embedded digits, or on other images.

    make evidence METHOD=deepcluster                                  # about 25 core-minutes
    python tests/evidence/deepcluster.py --data cifar10/train --val_path cifar10/test --flags "--arch resnet18 ..."

Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch, mean and standard
deviation over the seeds. "Before" is the partition of the features of random weights.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

from deepcluster.augmentations import MEAN, STD
from shared.evaluation.features import extract_features
from shared.evaluation.knn import knn_classify
from shared.evaluation.knn_monitor import KNNMonitor, open_labelled
from shared.pictures import read_log
from tests.evidence.runs import SEEDS, Variant, run_all, table, write

DIGITS = "--arch resnet18 --sobel --crop_size 32 --crop_scale 0.5 1 --pca_dim 64 --batch 32 --epochs 6"
CLAIMS = {
    "100 clusters": "--k 100",
    "10 clusters, as many as classes": "--k 10",
    "30 clusters": "--k 30",
    "300 clusters": "--k 300",
    "100 clusters, the released sampler": "--k 100 --sampler official",
    "power iteration clustering": "--clustering PIC",
}
COLUMNS = {
    "knn_before": "k-NN before",
    "knn_last": "k-NN after",
    "nmi_labels_before": "NMI with labels before",
    "nmi_labels_last": "after",
    "nmi_previous_first": "NMI of the first two partitions",
    "nmi_previous_last": "of the last two",
}


class Pixels(torch.nn.Module):
    """Raw pixels as features."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def pixel_knn(data: str | None, val_path: str | None, image_size: int) -> float:
    device = torch.device("cpu")
    monitor = KNNMonitor(open_labelled(data, val_path), image_size, MEAN, STD, 1, 1, device)
    train, val = (extract_features(Pixels(), dataset, device) for dataset in (monitor.train, monitor.val))
    return knn_classify(*train, *val, k=20)[0]


def agreements(run: Path) -> dict[str, float]:
    """Normalised mutual information at the start and at the end of a run."""
    lines = read_log(run / "metrics.jsonl")
    labels = [line["nmi_labels"] for line in lines if "nmi_labels" in line]
    previous = [line["nmi_previous"] for line in lines if "nmi_previous" in line]
    return {
        "nmi_labels_before": labels[0],
        "nmi_labels_last": labels[-1],
        "nmi_previous_first": previous[0],
        "nmi_previous_last": previous[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build/evidence/deepcluster")
    parser.add_argument("--data", help="training images; the embedded digits without it")
    parser.add_argument("--val_path", help="images for k-NN")
    parser.add_argument("--flags", default=DIGITS, help="of main.py, for all variants")
    parser.add_argument("--only", nargs="+", choices=tuple(CLAIMS), default=list(CLAIMS), help="variants")
    parser.add_argument("--image_size", type=int, default=32, help="side in pixels at which raw pixels are compared")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    out = args.out.absolute()
    common = f"{args.flags} --workers 0 --pictures off --log_freq 20 --eval_knn_freq {10**9}"
    if args.data:
        common += f" {Path(args.data).absolute()} --val_path {Path(args.val_path).absolute()}"
    variants = [Variant(name, f"{common} {CLAIMS[name]}") for name in args.only]
    results = run_all("deepcluster", variants, out, args.parallel, tuple(args.seeds))
    for result in results:
        result |= agreements(out / result["variant"].replace(" ", "_") / str(result["seed"]))
    pixels = pixel_knn(args.data, args.val_path, args.image_size)
    write(out, "deepcluster", results, table(results, COLUMNS) + f"\n\nk-NN on raw pixels: {pixels:.1f}")


if __name__ == "__main__":
    main()
