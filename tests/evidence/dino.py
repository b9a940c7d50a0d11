"""The small experiments behind dino/RESULTS.md: the paper's claims on the embedded digits, and CIFAR-10 at small scale.

    make evidence METHOD=dino                                         # the claims, about 30 core-minutes
    python tests/evidence/dino.py --only cifar10 --cifar10 DIR        # DIR holds train/ and test/ with class folders

Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch, mean and standard
deviation over the seeds.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dino.augmentations import MEAN, STD
from tests.evidence.runs import PixelFeatures, Variant, in_parallel, linear, main, run_all, spread, table, write

# Runs of 220 steps: the teacher follows fast, the centre faster still, and mild views keep what two of them share well
# above the ratio of the temperatures, below which every difference between images dies out.
DIGITS = (
    "--data_path digits --drop_path_rate 0 "
    "--arch vit_tiny --patch_size 8 --global_crop_size 16 --local_crop_size 8 --local_crops_number 2 --out_dim 256 "
    "--global_crops_scale 0.7 1 --local_crops_scale 0.4 0.7 --blur_radius 0.1 0.3 "
    "--batch_size_per_gpu 32 --lr 0.0005 --epochs 5 --warmup_epochs 1 --freeze_last_layer 0 "
    "--teacher_temp 0.015 --warmup_teacher_temp 0.015 --momentum_teacher 0.96 --momentum_teacher_end 0.99 "
    "--center_momentum 0.2 --num_workers 0 --pictures off --saveckp_freq 0 --log_freq 44"
)
CLAIMS = [
    Variant("DINO", DIGITS),
    Variant("no momentum teacher (the student itself)", f"{DIGITS} --momentum_teacher 0 --momentum_teacher_end 0"),
    Variant("two global crops only", f"{DIGITS} --local_crops_number 0"),
    Variant("patches of 4 instead of 8", f"{DIGITS} --patch_size 4"),
    Variant("no centring", f"{DIGITS} --center_momentum 1"),
    Variant("no sharpening", f"{DIGITS} --warmup_teacher_temp 0.1 --teacher_temp 0.1"),
    Variant("neither", f"{DIGITS} --center_momentum 1 --warmup_teacher_temp 0.1 --teacher_temp 0.1"),
]
# A small network with batch norm: in 20 minutes of one core a ViT sees too few images to leave its random features.
CIFAR10 = (
    "--arch resnet10t --global_crop_size 32 --local_crop_size 16 --local_crops_number 4 --out_dim 1024 "
    "--global_crops_scale 0.3 1 --local_crops_scale 0.1 0.3 --blur_radius 0.1 0.5 "
    "--batch_size_per_gpu 64 --lr 0.004 --weight_decay 0.0001 --weight_decay_end 0.0001 --epochs 5 --warmup_epochs 0.3 "
    "--freeze_last_layer 0 --teacher_temp 0.02 --warmup_teacher_temp 0.02 --momentum_teacher 0.98 "
    "--momentum_teacher_end 0.998 --center_momentum 0.5 --num_workers 0 --pictures off --saveckp_freq 0 --log_freq 25"
)
LINEAR = "--arch resnet10t --image_size 32 --num_labels 10 --epochs 5 --lr 0.1 --num_workers 0"


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    results = run_all("dino", CLAIMS, out / "digits", parallel, seeds)
    columns = {"knn_before": "k-NN before", "knn_last": "k-NN after", "teacher_entropy": "teacher entropy"}
    columns |= {"kl": "KL", "feature_spread": "feature spread"}
    text = table(results, columns) + f"\n\nk-NN on raw pixels: {PixelFeatures('digits', None, 16, MEAN, STD).knn():.1f}"
    write(out, "dino_digits", results, text)


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train: Path, test: Path) -> None:
    images = f"--data_path {train} --val_path {test}"
    results = run_all("dino", [Variant("DINO", f"{CIFAR10} {images}")], out / "cifar10", parallel, seeds)

    def probe(weights: str | Path, seed: int, folder: Path) -> float:
        flags = f"{LINEAR} {images} --pretrained_weights {weights} --seed {seed}"
        return linear("dino", flags, folder, "linear_log.txt")

    def probe_run(result: dict) -> float:
        return probe(result["run"] / "checkpoint.pth", result["seed"], result["run"] / "linear")

    trained = in_parallel(probe_run, results, parallel)
    random = in_parallel(lambda seed: probe("random", seed, out / "cifar10/random" / str(seed)), seeds, parallel)
    for result, accuracy, random_accuracy in zip(results, trained, random, strict=True):
        result.update(linear=accuracy, linear_before=random_accuracy)
    pixels = PixelFeatures(str(train), str(test), 32, MEAN, STD)
    after, before = (
        [spread([result[key] for result in results]) for key in keys]
        for keys in (("knn_last", "linear", "minutes"), ("knn_before", "linear_before"))
    )
    rows = [
        "| features | k-NN | linear | minutes a run |",
        "|---|---|---|---|",
        f"| raw pixels, 32 x 32 | {pixels.knn():.1f} | {pixels.linear():.1f} | |",
        f"| random weights | {' | '.join(before)} | |",
        f"| DINO, 5 epochs | {' | '.join(after)} |",
    ]
    write(out, "dino_cifar10", results, "\n".join(rows))


if __name__ == "__main__":
    main(__doc__, "dino", claims, cifar10)
