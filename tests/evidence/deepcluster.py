"""The small experiments behind deepcluster/README.md: the paper's claims on the embedded digits, and CIFAR-10.

    make evidence METHOD=deepcluster                                  # the claims, about 25 core-minutes
    python tests/evidence/deepcluster.py --only cifar10 --cifar10 DIR # DIR holds train/ and test/ with class folders

Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch, mean and standard
deviation over the seeds. "Before" is the partition of the features of random weights.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

from deepcluster.hub import MEAN, STD, build_network
from shared.run.log import read_log
from tests.evidence.runs import PixelFeatures, Variant, in_parallel, linear, main, run_all, spread, table, write

RUN = f"--workers 0 --pictures off --log_freq 20 --checkpoints 0 --eval_knn_freq {10**9}"
DIGITS = f"digits {RUN} --arch resnet18 --sobel --crop_size 32 --crop_scale 0.5 1 --pca_dim 64 --batch 32 --epochs 6"
CLAIMS = [
    Variant("100 clusters", f"{DIGITS} --k 100"),
    Variant("10 clusters, as many as classes", f"{DIGITS} --k 10"),
    Variant("30 clusters", f"{DIGITS} --k 30"),
    Variant("300 clusters", f"{DIGITS} --k 300"),
    Variant("100 clusters, the released sampler", f"{DIGITS} --k 100 --sampler official"),
    Variant("power iteration clustering", f"{DIGITS} --clustering PIC"),
]
COLUMNS = {
    "knn_before": "k-NN before",
    "knn_last": "k-NN after",
    "nmi_labels_before": "NMI with labels before",
    "nmi_labels_last": "after",
    "nmi_previous_first": "NMI of the first two partitions",
    "nmi_previous_last": "of the last two",
}

CIFAR10_SIZE = 32
CIFAR10 = f"--arch resnet10t --sobel --crop_size {CIFAR10_SIZE} --crop_scale 0.3 1 --pca_dim 128 --batch 64 --epochs 8"
CIFAR10_VARIANTS = [Variant("100 clusters", f"{RUN} {CIFAR10} --k 100")]
LINEAR = "--epochs 5 --batch_size 64 --lr 0.01 --wd -4 --workers 0"


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


def run_and_compare(out: Path, variants: list[Variant], parallel: int, seeds: tuple[int, ...]) -> list[dict]:
    """Every variant with every seed, and how its partitions agree with each other and with the labels."""
    results = run_all("deepcluster", variants, out, parallel, seeds)
    for result in results:
        result |= agreements(result["run"])
    return results


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    results = run_and_compare(out / "digits", CLAIMS, parallel, seeds)
    pixels = PixelFeatures("digits", None, 32, MEAN, STD)
    text = f"{table(results, COLUMNS)}\n\nk-NN on raw pixels: {pixels.knn():.1f}"
    write(out, "deepcluster_digits", results, text)


def save_random_weights(path: Path, seed: int) -> Path:
    """A checkpoint of the network before training."""
    torch.manual_seed(seed)
    network = build_network("resnet10t", sobel=True, img_size=CIFAR10_SIZE)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"arch": "resnet10t", "state_dict": network.state_dict(), "args": {"crop_size": CIFAR10_SIZE}}, path)
    return path


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train: Path, test: Path) -> None:
    images = f"{train} --val_path {test}"
    variants = [Variant(v.name, f"{v.flags} {images}") for v in CIFAR10_VARIANTS]
    results = run_and_compare(out / "cifar10", variants, parallel, seeds)

    def probe(weights: Path) -> float:
        flags = f"--data {images} --model {weights} {LINEAR}"
        return linear("deepcluster", flags, weights.parent / "linear", "linear_log.txt")

    trained = in_parallel(probe, [result["run"] / "checkpoint.pth.tar" for result in results], parallel)
    for result, accuracy in zip(results, trained, strict=True):
        result["linear"] = accuracy
    untrained = [save_random_weights(out / "cifar10/random" / str(seed) / "random.pth", seed) for seed in seeds]
    random = in_parallel(probe, untrained, parallel)
    pixels = PixelFeatures(str(train), str(test), CIFAR10_SIZE, MEAN, STD)
    text = (
        f"{table(results, COLUMNS | {'linear': 'linear'})}\n\nLinear on random weights: {spread(random)}. "
        f"Raw pixels: k-NN {pixels.knn():.1f}, linear {pixels.linear():.1f}"
    )
    write(out, "deepcluster_cifar10", results, text)


if __name__ == "__main__":
    main(__doc__, "deepcluster", claims, cifar10)
