"""The small experiments behind deepcluster/README.md: the paper's claims on the digits, and CIFAR-10.

    make evidence METHOD=deepcluster                                  # the claims, about 25 core-minutes
    python -m tests.evidence.deepcluster --only cifar10 --cifar10 DIR # DIR holds train/ and test/ with class folders

Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch, mean and standard
deviation over the seeds. "Before" is the partition of the features of random weights.
"""

from dataclasses import replace
from pathlib import Path

from torch import nn

from deepcluster.hub import CARD, load_network
from shared.run.log import read_log
from tests.evidence.claims import Claim
from tests.evidence.probe import Features, Pixels, baselines, with_linear
from tests.evidence.runs import Variant, cifar10_images, main, run_all, table, write

RUN = f"--workers 0 --pictures off --log_freq 20 --checkpoints 0 --eval_knn_freq {10**9}"
DIGITS = f"digits {RUN} --arch resnet18 --sobel --crop_size 32 --crop_scale 0.5 1 --pca_dim 64 --batch 32 --epochs 6"
VARIANTS = [
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
CIFAR10_VARIANTS = [Variant(f"{k} clusters", f"{RUN} {CIFAR10} --k {k}") for k in (100, 10, 1000)]
LONG_TAIL = [round(1600 * 0.01 ** (number / 9)) for number in range(10)]  # images of the classes: 1,600 to 16
TAIL_VARIANTS = [
    Variant(f"long tail, {name}", f"{RUN} {CIFAR10} --epochs 20 --k 100 --sampler {sampler}")
    for name, sampler in (("uniform over the clusters", "uniform"), ("the released sampler", "official"))
]
AGREE = {"metric": "nmi_labels_last", "beside": "nmi_labels_before"}
# fmt: off
CLAIMS = [
    Claim("successive partitions agree more and more (4.1)", "digits, NMI of the first and last pair",
          "deepcluster_digits", "100 clusters", metric="nmi_previous_last", beside="nmi_previous_first"),
    Claim("partitions and classes agree more and more", "digits, 100 clusters", "deepcluster_digits", "100 clusters",
          **AGREE),
    Claim("and so in all variants", "digits", "deepcluster_digits", tuple(v.name for v in VARIANTS), **AGREE),
    Claim("over-clustering helps (4.1)", "digits, ten times as many clusters as classes beside as many, k-NN",
          "deepcluster_digits", "100 clusters", "10 clusters, as many as classes", "knn_last"),
    Claim("drawing clusters uniformly helps", "digits, beside the released sampler, k-NN", "deepcluster_digits",
          "100 clusters", "100 clusters, the released sampler", "knn_last"),
    Claim("over-clustering helps", "CIFAR-10, 100 and 1,000 clusters beside 10, linear", "deepcluster_cifar10",
          ("100 clusters", "1000 clusters"), "10 clusters", "linear"),
    Claim("drawing clusters uniformly helps", "CIFAR-10 with a long tail, k-NN", "deepcluster_long_tail",
          TAIL_VARIANTS[0].name, TAIL_VARIANTS[1].name, "knn_last"),
    Claim("features beat random weights", "digits, k-NN", "deepcluster_digits", "100 clusters", metric="knn_last",
          beside="knn_before"),
    Claim("the same", "CIFAR-10, 8 epochs, k-NN", "deepcluster_cifar10", "100 clusters", "random weights",
          "knn_last"),
    Claim("ImageNet and Places, linear, layer by layer"),
    Claim("transfer to VOC: classification, detection, segmentation"),
    Claim("uncurated images (YFCC100M)"),
    Claim("deeper networks gain; instance retrieval"),
]
# fmt: on


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
    results = run_and_compare(out / "digits", VARIANTS, parallel, seeds)
    results.append({"variant": "raw pixels", "knn_last": Features(CARD, Pixels(), ("digits", None), 32).knn()})
    write(out, "deepcluster_digits", results, table(results, COLUMNS))


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train: Path, test: Path) -> None:
    images, here = (str(train), str(test)), out / "cifar10"
    results = run_and_compare(here, on_images(CIFAR10_VARIANTS, *images), parallel, seeds)
    results = with_linear(results, CARD, load, images, CIFAR10_SIZE, parallel)
    results += baselines(CARD, images, CIFAR10_SIZE, here, seeds, "resnet10t", sobel=True, img_size=CIFAR10_SIZE)
    write(out, "deepcluster_cifar10", results, table(results, COLUMNS | {"linear": "linear"}))
    tail = cifar10_images(train.parent, out / "long_tail", LONG_TAIL)
    results = run_and_compare(out / "long_tail", on_images(TAIL_VARIANTS, *tail), parallel, seeds)
    write(out, "deepcluster_long_tail", results, table(results, COLUMNS))


def on_images(variants: list[Variant], train: str | Path, test: str | Path) -> list[Variant]:
    """The variants on images to train and to evaluate on."""
    return [replace(variant, flags=f"{variant.flags} {train} --val_path {test}") for variant in variants]


def load(run: Path) -> nn.Module:
    return load_network(run / "checkpoint.pth.tar", keep_top_layer=False)


if __name__ == "__main__":
    main(__doc__, "deepcluster", claims, cifar10)
