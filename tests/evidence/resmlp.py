"""The small experiments of resmlp/RESULTS.md: the paper's claims on the embedded data, and CIFAR-10 at small scale.

    make evidence METHOD=resmlp                                       # the claims, about 40 core-minutes
    python tests/evidence/resmlp.py --only cifar10 --cifar10 DIR      # DIR holds train/ and test/ with class folders

The claims: ResMLP beside a ViT and a ResNet of about equal multiply-adds, and distilled from that ResNet, on the
digits; translation of the generated language pair by ResMLP beside a Transformer of equal size. On CIFAR-10 also the
features that DINO learns with ResMLP. Every run uses one thread; --parallel of them run at a time. Numbers are those of
the last epoch, mean and standard deviation over the seeds.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from torch import nn

from resmlp.hub import build_network
from resmlp.main import parse_args
from tests.evidence.runs import (
    Variant,
    beside_others,
    in_parallel,
    last_values,
    linear,
    main,
    run,
    run_all,
    table,
    write,
)

RUN = "--num_workers 0 --pictures off --no-model-ema --no-repeated-aug --drop-path 0 --input-size 32"
# about 50 million multiply-adds per image of 32 pixels, but the ResNet, whose 37 are the nearest below
NETWORKS = {
    "ResMLP": "--model resmlp_12 --patch-size 4 --embed-dim 120 --depth 6",
    "ViT": "--model vit_tiny_patch16_224 --patch-size 4 --embed-dim 96 --depth 6",
    "ResNet-18": "--model resnet18",
}
DIGITS = (
    f"{RUN} --data_path digits --epochs 8 --batch-size 32 --lr 0.016 --warmup-epochs 0 --aa none --reprob 0 --mixup 0 "
    "--cutmix 0"
)
CIFAR10 = f"{RUN} --epochs 5 --batch-size 64 --lr 0.004 --warmup-epochs 0 --aa none --reprob 0 --mixup 0.2 --cutmix 1"
TRANSLATION = "--epochs 12 --log_freq 31"
CLAIMS = [Variant(name, f"{flags} {DIGITS}") for name, flags in NETWORKS.items()]
CIFAR10_VARIANTS = [Variant(name, f"{flags} {CIFAR10}") for name, flags in NETWORKS.items()]
TRANSLATORS = [
    Variant("ResMLP translator", f"--network resmlp {TRANSLATION}", "translation/main.py"),
    Variant("Transformer of equal size", f"--network transformer {TRANSLATION}", "translation/main.py"),
]
DINO = (
    "--arch resmlp_12 --global_crop_size 32 --local_crop_size 32 --local_crops_number 2 --out_dim 1024 "
    "--global_crops_scale 0.5 1 --local_crops_scale 0.2 0.5 --blur_radius 0.1 0.5 --batch_size_per_gpu 64 --lr 0.0005 "
    "--epochs 5 --warmup_epochs 1 --freeze_last_layer 0 --teacher_temp 0.015 --warmup_teacher_temp 0.015 "
    "--momentum_teacher 0.96 --momentum_teacher_end 0.99 --center_momentum 0.2 --num_workers 0 --pictures off "
    "--saveckp_freq 0 --eval_knn_freq 1"
)
LINEAR = "--epochs 5 --val_freq 5 --lr 0.1 --crop_scale 0.5 1 --num_workers 0"


def build(flags: list[str]) -> tuple[nn.Module, int]:
    """The network and the side of its images."""
    args = parse_args(flags)
    sizes = {"patch_size": args.patch_size, "embed_dim": args.embed_dim, "depth": args.depth}
    return build_network(args.model, 10, args.input_size, **sizes), args.input_size


def translator(output_dir: Path) -> dict:
    """BLEU, which the script prints at its end, and losses."""
    last = last_values(output_dir)
    bleu = float(output_dir.with_suffix(".log").read_text().split(", test: BLEU = ")[1].split()[0])
    return {"bleu": bleu, "loss": last["loss"], "valid_loss": last["valid_loss"]}


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    results = beside_others("resmlp", CLAIMS, build, "resnet18", out / "digits", parallel, seeds)
    columns = {"acc1": "top-1", "test_loss": "test loss", "loss": "training loss"}
    write(out, "resmlp_digits", results, table(results, columns))
    translated = run_all("resmlp", TRANSLATORS, out / "translation", parallel, seeds, translator)
    columns = {"bleu": "BLEU", "valid_loss": "loss per token, valid", "loss": "smoothed loss, train"}
    write(out, "resmlp_translation", translated, table(translated, columns))


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train_images: Path, test_images: Path) -> None:
    images = f"--data_path {train_images} --val_path {test_images}"
    variants = [Variant(v.name, f"{v.flags} {images}") for v in CIFAR10_VARIANTS]
    results = beside_others("resmlp", variants, build, "resnet18", out / "cifar10", parallel, seeds)
    columns = {"acc1": "top-1", "test_loss": "test loss", "loss": "training loss"}
    write(out, "resmlp_cifar10", results, table(results, columns))
    self_supervised(out, parallel, seeds, train_images, test_images)


def self_supervised(out: Path, parallel: int, seeds: tuple[int, ...], train_images: Path, test_images: Path) -> None:
    """DINO with ResMLP-S12, and a linear classifier on its features."""
    images = f"--data_path {train_images} --val_path {test_images}"

    def train(seed: int) -> dict:
        variant = Variant("DINO with ResMLP-S12", f"{DINO} {images}", "main_dino.py")
        result = run("dino", variant, seed, out / "cifar10/dino" / str(seed))
        flags = f"{LINEAR} {images} --pretrained_weights {result['run'] / 'checkpoint.pth'} --seed {seed}"
        result["linear"] = linear("resmlp", flags, result["run"] / "linear", "linear_log.txt")
        return result

    results = in_parallel(train, seeds, parallel)
    columns = {"knn_before": "k-NN before", "knn_last": "k-NN after", "linear": "linear, 5 epochs"}
    write(out, "resmlp_cifar10_dino", results, table(results, columns))


if __name__ == "__main__":
    main(__doc__, "resmlp", claims, cifar10)
