"""The small experiments behind dino/README.md: the paper's claims on the embedded digits, and CIFAR-10 at small scale.

    make evidence METHOD=dino                                         # the claims, about 30 core-minutes
    python tests/evidence/dino.py --only cifar10 --cifar10 DIR        # DIR holds train/ and test/ with class folders

Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch, mean and standard
deviation over the seeds.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

from dino.augmentations import MEAN, STD
from shared.evaluation.features import extract_features
from shared.evaluation.knn import knn_classify
from shared.evaluation.knn_monitor import KNNMonitor, open_labelled
from tests.evidence.runs import SEEDS, Variant, run_all, spread, table, write

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
IMAGES_PER_CLASS = 1600
CIFAR10 = (
    "--arch vit_tiny --patch_size 8 --global_crop_size 32 --local_crop_size 16 --local_crops_number 4 --out_dim 1024 "
    "--global_crops_scale 0.5 1 --local_crops_scale 0.2 0.5 --blur_radius 0.1 0.5 "
    "--batch_size_per_gpu 64 --lr 0.0005 --epochs 3 --warmup_epochs 0.2 --freeze_last_layer 0 "
    "--teacher_temp 0.015 --warmup_teacher_temp 0.015 --momentum_teacher 0.96 --momentum_teacher_end 0.99 "
    "--center_momentum 0.2 --num_workers 0 --pictures off --saveckp_freq 0 --log_freq 25"
)


class Pixels(torch.nn.Module):
    """Raw pixels as features."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def pixel_knn(data_path: str | None, val_path: str | None, image_size: int) -> float:
    device = torch.device("cpu")
    monitor = KNNMonitor(open_labelled(data_path, val_path), image_size, MEAN, STD, 1, 1, device)
    train, val = (extract_features(Pixels(), dataset, device) for dataset in (monitor.train, monitor.val))
    return knn_classify(*train, *val, k=20)[0]


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    results = run_all("dino", CLAIMS, out / "digits", parallel, seeds)
    columns = {"knn_before": "k-NN before", "knn_last": "k-NN after", "teacher_entropy": "teacher entropy", "kl": "KL",
               "feature_spread": "feature spread"}  # fmt: skip
    text = table(results, columns) + f"\n\nk-NN on raw pixels: {pixel_knn(None, None, 16):.1f}"
    write(out, "dino_digits", results, text)


def few_per_class(folder: Path, few: Path) -> Path:
    """A folder of links to the first IMAGES_PER_CLASS images of every class."""
    for images in sorted(folder.iterdir()):
        (few / images.name).mkdir(parents=True, exist_ok=True)
        for image in sorted(images.iterdir())[:IMAGES_PER_CLASS]:
            link = few / images.name / image.name
            if not link.exists():
                link.symlink_to(image)
    return few


def linear(weights: Path, train: Path, val: str, out: Path) -> float:
    """Top-1 of the linear classifier after its last epoch."""
    command = (
        f"eval_linear.py --arch vit_tiny --patch_size 8 --pretrained_weights {weights} --data_path {train} "
        f"--val_path {val} --image_size 32 --num_labels 10 --epochs 3 --lr 0.01 --num_workers 0 "
        f"--output_dir {out}"
    )
    out.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, *command.split()], cwd=ROOT / "dino", check=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    return json.loads((out / "linear_log.txt").read_text().splitlines()[-1])["test_acc1"]


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], folder: str) -> None:
    train = few_per_class(Path(folder) / "train", out / "train")
    flags = f"{CIFAR10} --data_path {train} --val_path {folder}/test"
    results = run_all("dino", [Variant("CIFAR-10", flags)], out, parallel, seeds)
    for result in results:
        run = out / "CIFAR-10" / str(result["seed"])
        result["linear"] = linear(run / "checkpoint.pth", train, f"{folder}/test", run / "linear")
        result["command"] = result["command"].replace(str(train), "cifar10/train").replace(folder, "cifar10")
    rows = [
        "| features | k-NN | linear, 3 epochs |",
        "|---|---|---|",
        f"| raw pixels, 32 x 32 | {pixel_knn(str(train), f'{folder}/test', 32):.1f} | |",
        f"| random weights | {spread([r['knn_before'] for r in results])} | |",
        f"| DINO, 3 epochs | {spread([r['knn_last'] for r in results])} | {spread([r['linear'] for r in results])} |",
    ]
    write(out, "dino_cifar10", results, "\n".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build/evidence/dino")
    parser.add_argument("--only", choices=("claims", "cifar10"), help="one of the two")
    parser.add_argument("--cifar10", default=None, help="folder with train/ and test/; without it only the claims")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    out = args.out.absolute()
    if args.only != "cifar10":
        claims(out, args.parallel, tuple(args.seeds))
    if args.only != "claims" and args.cifar10:
        cifar10(out, args.parallel, tuple(args.seeds), str(Path(args.cifar10).absolute()))


if __name__ == "__main__":
    main()
