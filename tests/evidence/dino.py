"""The small experiments behind dino/README.md: the paper's claims on the embedded digits, and CIFAR-10 at small scale.

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
from tests.evidence.runs import PixelFeatures, Variant, linear, main, run_all, spread, table, write

# Runs of 220 steps: the teacher follows fast, the centre faster still, and mild views keep what two of them share well
# above the ratio of the temperatures, below which every difference between images dies out.
DIGITS = (
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
CIFAR10 = (
    "--arch vit_tiny --patch_size 8 --global_crop_size 32 --local_crop_size 16 --local_crops_number 4 --out_dim 1024 "
    "--global_crops_scale 0.5 1 --local_crops_scale 0.2 0.5 --blur_radius 0.1 0.5 "
    "--batch_size_per_gpu 64 --lr 0.0005 --epochs 3 --warmup_epochs 0.2 --freeze_last_layer 0 "
    "--teacher_temp 0.015 --warmup_teacher_temp 0.015 --momentum_teacher 0.96 --momentum_teacher_end 0.99 "
    "--center_momentum 0.2 --num_workers 0 --pictures off --saveckp_freq 0 --log_freq 25"
)


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    results = run_all("dino", CLAIMS, out / "digits", parallel, seeds)
    columns = {"knn_before": "k-NN before", "knn_last": "k-NN after", "teacher_entropy": "teacher entropy", "kl": "KL",
               "feature_spread": "feature spread"}  # fmt: skip
    text = table(results, columns) + f"\n\nk-NN on raw pixels: {PixelFeatures(None, None, 16, MEAN, STD).knn():.1f}"
    write(out, "dino_digits", results, text)


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train: Path, test: Path) -> None:
    images = f"--data_path {train} --val_path {test}"
    results = run_all("dino", [Variant("CIFAR-10", f"{CIFAR10} {images}")], out, parallel, seeds)
    for result in results:
        probe = (
            f"--arch vit_tiny --patch_size 8 --pretrained_weights {result['run'] / 'checkpoint.pth'} {images} "
            "--image_size 32 --num_labels 10 --epochs 3 --lr 0.01 --num_workers 0"
        )
        result["linear"] = linear("dino", probe, result["run"] / "linear", "linear_log.txt")
        result["command"] = result["command"].replace(images, "--data_path cifar10/train --val_path cifar10/test")
    pixels = PixelFeatures(str(train), str(test), 32, MEAN, STD)
    rows = [
        "| features | k-NN | linear, 3 epochs |",
        "|---|---|---|",
        f"| raw pixels, 32 x 32 | {pixels.knn():.1f} | |",
        f"| random weights | {spread([r['knn_before'] for r in results])} | |",
        f"| DINO, 3 epochs | {spread([r['knn_last'] for r in results])} | {spread([r['linear'] for r in results])} |",
    ]
    write(out, "dino_cifar10", results, "\n".join(rows))


if __name__ == "__main__":
    main(__doc__, "dino", claims, cifar10)
