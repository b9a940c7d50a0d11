"""The small experiments of xcit/RESULTS.md: the digits and CIFAR-10, beside a ViT and a ResNet of equal cost.

    make evidence METHOD=xcit                                         # the digits, about 40 core-minutes
    python tests/evidence/xcit.py --only cifar10 --cifar10 DIR        # DIR holds train/ and test/ with class folders

All networks see the same images and augmentation for as many epochs, with the same optimiser, and have about as many
multiply-adds per image (printed first). XCiT is also distilled from the ResNet of the same seed; on CIFAR-10 DINO
trains an XCiT and a ViT too. Every run uses one thread; --parallel of them run at a time. Numbers are those of the last
epoch, mean and standard deviation over the seeds.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from torch import nn

from tests.evidence import dino
from tests.evidence.runs import Variant, beside_others, in_parallel, linear, main, run, table, write
from xcit.hub import build_network
from xcit.main import parse_args

RUN = (
    "--num_workers 0 --pictures off --log_freq 20 --no-model-ema --no-repeated-aug --drop-path 0 --reprob 0 --full_crop"
)
NETWORKS = {  # about as many multiply-adds: 100 million per image of 64 pixels, 16 tokens
    "XCiT": "--model xcit_tiny_12_p16",
    "ViT": "--model deit_tiny_patch16_224",
    "ResNet": "--model resnet10t",
}
DIGITS = (
    f"{RUN} --data_path digits --input-size 64 --epochs 5 --batch-size 32 --lr 0.008 --warmup-epochs 0 --aa none "
    "--mixup 0 --cutmix 0"
)
CIFAR10 = (
    f"{RUN} --input-size 48 --epochs 5 --batch-size 64 --lr 0.004 --warmup-epochs 0 --aa none --mixup 0.2 --cutmix 1"
)
CLAIMS = [Variant(name, f"{flags} {DIGITS}") for name, flags in NETWORKS.items()]
CIFAR10_VARIANTS = [Variant(name, f"{flags} {CIFAR10}") for name, flags in NETWORKS.items()]
# a ResNet's learning rate is too large for it
DINO = f"{dino.CIFAR10} --lr 0.0005 --weight_decay 0.04 --weight_decay_end 0.4"
SELF_SUPERVISED = {"XCiT-N12/8": "--arch xcit_nano_12_p8", "ViT-Ti/8": "--arch vit_tiny --patch_size 8"}
LINEAR = "--image_size 32 --num_labels 10 --epochs 5 --lr 0.1 --num_workers 0"
COLUMNS = {"acc1": "top-1", "test_loss": "test loss", "loss": "training loss"}


def build(flags: list[str]) -> tuple[nn.Module, int]:
    """The network and the side of its images."""
    args = parse_args(flags)
    return build_network(args.model, 10, img_size=args.input_size), args.input_size


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    results = beside_others("xcit", CLAIMS, build, "resnet10t", out / "digits", parallel, seeds)
    write(out, "xcit_digits", results, table(results, COLUMNS))


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train_images: Path, test_images: Path) -> None:
    images = f"--data_path {train_images} --val_path {test_images}"
    variants = [Variant(v.name, f"{v.flags} {images}") for v in CIFAR10_VARIANTS]
    results = beside_others("xcit", variants, build, "resnet10t", out / "cifar10", parallel, seeds)
    write(out, "xcit_cifar10", results, table(results, COLUMNS))
    self_supervised(out, parallel, seeds, train_images, test_images)


def self_supervised(out: Path, parallel: int, seeds: tuple[int, ...], train_images: Path, test_images: Path) -> None:
    """DINO with either network, and a linear classifier on its features."""
    images = f"--data_path {train_images} --val_path {test_images}"

    def train(job: tuple[str, int]) -> dict:
        name, seed = job
        variant = Variant(f"DINO, {name}", f"{DINO} {SELF_SUPERVISED[name]} {images}", "main_dino.py")
        result = run("dino", variant, seed, out / "dino" / name.replace("/", "-") / str(seed))
        weights = f"--pretrained_weights {result['run'] / 'checkpoint.pth'} --seed {seed}"
        flags = f"{SELF_SUPERVISED[name]} {LINEAR} {images} {weights}"
        result["linear"] = linear("dino", flags, result["run"] / "linear", "linear_log.txt")
        return result

    results = in_parallel(train, [(name, seed) for name in SELF_SUPERVISED for seed in seeds], parallel)
    columns = {"knn_before": "k-NN before", "knn_last": "k-NN after", "linear": "linear, 5 epochs"}
    write(out, "xcit_cifar10_dino", results, table(results, columns))


if __name__ == "__main__":
    main(__doc__, "xcit", claims, cifar10)
