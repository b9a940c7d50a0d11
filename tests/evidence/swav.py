"""The small experiments behind swav/README.md: the paper's claims on the digits, and CIFAR-10 at small scale.

    make evidence METHOD=swav                                         # the claims, about 30 core-minutes
    python -m tests.evidence.swav --only cifar10 --cifar10 DIR        # DIR holds train/ and test/ with class folders

Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch, mean and standard
deviation over the seeds.
"""

from pathlib import Path

from torch import nn

from swav.hub import CARD, load_backbone
from tests.evidence.claims import Claim
from tests.evidence.probe import Features, Pixels, baselines, with_linear
from tests.evidence.runs import Variant, cifar10_images, main, run_all, table, with_images, write

RUN = "--num_workers 0 --pictures off --checkpoint_freq 0"
BOTH = (
    f"{RUN} --log_freq 22 --epochs 18 --data_path digits --arch test_resnet --hidden_mlp 256 --feat_dim 32 "
    "--nmb_crops 2 --size_crops 32 --min_scale_crops 0.6 --max_scale_crops 1 --blur_radius 0.1 0.5 --batch_size 64 "
    "--base_lr 2 --warmup_epochs 2"
)
DIGITS = f"{BOTH} --nmb_prototypes 30 --epsilon 0.02 --freeze_prototypes_niters 66"
# A step with small crops takes 1.7 times as long, hence 11 epochs instead of 18.
MULTI_CROP = "--epochs 11 --nmb_crops 2 4 --size_crops 32 16 --min_scale_crops 0.6 0.5 --max_scale_crops 1 0.8"
# a quarter of the batch: a quarter of the learning rate, and four times as many steps with frozen prototypes
SMALL_BATCH = "--batch_size 16 --base_lr 0.5 --freeze_prototypes_niters 264 --log_freq 89"
VARIANTS = [
    Variant("SwAV", DIGITS),
    Variant("multi-crop, equal compute", f"{DIGITS} {MULTI_CROP}"),
    Variant("batch 16", f"{DIGITS} {SMALL_BATCH}"),
    Variant("batch 16 and a queue", f"{DIGITS} {SMALL_BATCH} --queue_length 240 --epoch_queue_starts 3"),
    Variant("100 prototypes", f"{DIGITS} --nmb_prototypes 100"),
    Variant("300 prototypes", f"{DIGITS} --nmb_prototypes 300"),
    Variant("DeepCluster-v2", f"{BOTH} --nmb_prototypes 30 30 30", "main_deepclusterv2.py"),
]
COLUMNS = {
    "knn_before": "k-NN before",
    "knn_last": "k-NN after",
    "loss": "loss",
    "prototype_perplexity": "perplexity of the prototypes",
    "feature_spread": "feature spread",
    "rank_me": "RankMe",
}

CIFAR10_SIZE = 32
TWO_CROPS = f"--nmb_crops 2 --size_crops {CIFAR10_SIZE} --min_scale_crops 0.3 --max_scale_crops 1"
# Network, views and epochs are those of DINO's run. At a learning rate of 2, which the digits bear, the features of a
# ResNet-18 lose their rank within 25 steps.
CIFAR10 = (
    f"{RUN} --log_freq 25 --arch resnet10t --nmb_crops 2 4 --size_crops {CIFAR10_SIZE} 16 --min_scale_crops 0.3 0.1 "
    "--max_scale_crops 1 0.3 --blur_radius 0.1 0.5 --hidden_mlp 512 --feat_dim 64 --batch_size 64 --base_lr 1 "
    "--epochs 5 --warmup_epochs 0.3"
)
SWAV = f"{CIFAR10} --nmb_prototypes 100 --epsilon 0.03 --freeze_prototypes_niters 125"
CIFAR10_VARIANTS = [
    Variant("SwAV", SWAV),
    Variant("DeepCluster-v2", f"{CIFAR10} --nmb_prototypes 100 100 100", "main_deepclusterv2.py"),
    Variant("two crops, 7 epochs", f"{SWAV} {TWO_CROPS} --epochs 7", "main_swav.py"),  # in about the time of SwAV
]
# 300 prototypes share 16 embeddings of a view, or 976 with the queue, which the first of three epochs is without.
QUEUE = (
    f"{RUN} --log_freq 100 --arch resnet10t {TWO_CROPS} --blur_radius 0.1 0.5 --hidden_mlp 512 --feat_dim 64 "
    "--batch_size 16 --base_lr 0.25 --epochs 3 --warmup_epochs 0.3 --nmb_prototypes 300 --epsilon 0.03 "
    "--freeze_prototypes_niters 300"
)
QUEUE_VARIANTS = [
    Variant("batch 16, no queue", QUEUE, "main_swav.py"),
    Variant("batch 16, a queue of 960", f"{QUEUE} --queue_length 960 --epoch_queue_starts 1", "main_swav.py"),
]
QUEUE_IMAGES = 800  # of every class
# fmt: off
CLAIMS = [
    Claim("the number of prototypes hardly matters", "digits, 100 beside 30, within a point", "swav_digits",
          "100 prototypes", "SwAV", "knn_last", within=1),
    Claim("the same", "300 beside 100", "swav_digits", "300 prototypes", "100 prototypes", "knn_last", within=1),
    Claim("DeepCluster-v2 is within a point at equal epochs", "CIFAR-10, linear", "swav_cifar10", "DeepCluster-v2",
          "SwAV", "linear", within=1),
    Claim("multi-crop helps at equal compute", "digits, k-NN", "swav_digits", "multi-crop, equal compute", "SwAV",
          "knn_last"),
    Claim("the same", "CIFAR-10, linear", "swav_cifar10", "SwAV",
          "two crops, 7 epochs", "linear"),
    Claim("a queue helps small batches", "digits, batch of 16, k-NN", "swav_digits", "batch 16 and a queue", "batch 16",
          "knn_last"),
    Claim("a queue helps a batch of 16 with 300 prototypes", "CIFAR-10, k-NN", "swav_queue",
          QUEUE_VARIANTS[1].name, QUEUE_VARIANTS[0].name, "knn_last"),
    Claim("features are learned without labels", "CIFAR-10, linear", "swav_cifar10", "SwAV",
          "random weights", "linear"),
    Claim("ImageNet: 75.3 linear, near supervised"),
    Claim("transfer above supervised features"),
    Claim("few labels, fine-tuned"),
    Claim("uncurated images"),
    Claim("wider networks gain more"),
]
# fmt: on


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    results = run_all("swav", VARIANTS, out / "digits", parallel, seeds)
    results.append({"variant": "raw pixels", "knn_last": Features(CARD, Pixels(), ("digits", None), 32).knn()})
    write(out, "swav_digits", results, table(results, COLUMNS))


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train: Path, test: Path) -> None:
    queue(out, parallel, seeds, train.parent)
    images, here = (str(train), str(test)), out / "cifar10"
    results = run_all("swav", with_images(CIFAR10_VARIANTS, images), here, parallel, seeds)
    results = with_linear(results, CARD, load, images, CIFAR10_SIZE, parallel)
    results = baselines(CARD, images, CIFAR10_SIZE, here, seeds, "resnet10t") + results
    write(out, "swav_cifar10", results, table(results, {"knn_last": "k-NN", "linear": "linear", "rank_me": "RankMe"}))


def queue(out: Path, parallel: int, seeds: tuple[int, ...], folder: Path) -> None:
    """A small batch with a queue and without, on fewer images (below ``folder``) and more epochs of them."""
    images = tuple(map(str, cifar10_images(folder, out / "queue", QUEUE_IMAGES)))
    results = run_all("swav", with_images(QUEUE_VARIANTS, images), out / "queue", parallel, seeds)
    write(out, "swav_queue", results, table(results, COLUMNS))


def load(run: Path) -> nn.Module:
    return load_backbone("resnet10t", run / "checkpoint.pth.tar")


if __name__ == "__main__":
    main(__doc__, "swav", claims, cifar10)
