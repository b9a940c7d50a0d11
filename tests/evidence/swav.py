"""The small experiments behind swav/README.md: the paper's claims on the embedded digits, and CIFAR-10 at small scale.

    make evidence METHOD=swav                                         # the claims, about 30 core-minutes
    python tests/evidence/swav.py --only cifar10 --cifar10 DIR        # DIR holds train/ and test/ with class folders

Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch, mean and standard
deviation over the seeds.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from swav.hub import MEAN, STD
from tests.evidence.runs import PixelFeatures, Variant, in_parallel, linear, main, run_all, spread, table, write

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
CLAIMS = [
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
# Network, views and epochs are those of DINO's run. At a learning rate of 2, which the digits bear, the features of a
# ResNet-18 lose their rank within 25 steps.
CIFAR10 = (
    f"{RUN} --log_freq 25 --arch resnet10t --nmb_crops 2 4 --size_crops {CIFAR10_SIZE} 16 --min_scale_crops 0.3 0.1 "
    "--max_scale_crops 1 0.3 --blur_radius 0.1 0.5 --hidden_mlp 512 --feat_dim 64 --batch_size 64 --base_lr 1 "
    "--epochs 5 --warmup_epochs 0.3"
)
CIFAR10_VARIANTS = [
    Variant("SwAV", f"{CIFAR10} --nmb_prototypes 100 --epsilon 0.03 --freeze_prototypes_niters 125"),
    Variant("DeepCluster-v2", f"{CIFAR10} --nmb_prototypes 100 100 100", "main_deepclusterv2.py"),
]
LINEAR = (
    f"--arch resnet10t --image_size {CIFAR10_SIZE} --num_labels 10 --epochs 5 --val_freq 5 --batch_size 64 --lr 0.1 "
    "--crop_scale 0.5 1 --num_workers 0"
)


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    results = run_all("swav", CLAIMS, out / "digits", parallel, seeds)
    pixels = PixelFeatures("digits", None, 32, MEAN, STD)
    write(out, "swav_digits", results, f"{table(results, COLUMNS)}\n\nk-NN on raw pixels: {pixels.knn():.1f}")


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train: Path, test: Path) -> None:
    images = f"--data_path {train} --val_path {test}"
    variants = [Variant(v.name, f"{v.flags} {images}", v.script) for v in CIFAR10_VARIANTS]
    results = run_all("swav", variants, out / "cifar10", parallel, seeds)

    def probe(weights: str | Path, seed: int, folder: Path) -> float:
        return linear("swav", f"{LINEAR} {images} --pretrained {weights} --seed {seed}", folder, "log.txt")

    def probe_run(result: dict) -> float:
        return probe(result["run"] / "checkpoint.pth.tar", result["seed"], result["run"] / "linear")

    trained = in_parallel(probe_run, results, parallel)
    random = in_parallel(lambda seed: probe("random", seed, out / "cifar10/random" / str(seed)), seeds, parallel)
    for result, accuracy in zip(results, trained, strict=True):
        result["linear"] = accuracy
    pixels = PixelFeatures(str(train), str(test), CIFAR10_SIZE, MEAN, STD)
    rows = [
        "| features | k-NN | linear, 5 epochs | minutes a run |",
        "|---|---|---|---|",
        f"| raw pixels | {pixels.knn():.1f} | {pixels.linear():.1f} | |",
        f"| random weights | {spread([r['knn_before'] for r in results[: len(seeds)]])} | {spread(random)} | |",
    ]
    for variant in variants:
        mine = [r for r in results if r["variant"] == variant.name]
        cells = [spread([r[key] for r in mine]) for key in ("knn_last", "linear", "minutes")]
        rows.append(f"| {variant.name}, 5 epochs | {' | '.join(cells)} |")
    write(out, "swav_cifar10", results, "\n".join(rows))


if __name__ == "__main__":
    main(__doc__, "swav", claims, cifar10)
