"""The small experiments of xcit/RESULTS.md: the digits and CIFAR-10, beside a ViT and a ResNet of equal cost.

    make evidence METHOD=xcit                                         # the digits, about 40 core-minutes
    python -m tests.evidence.xcit --only cifar10 --cifar10 DIR        # DIR holds train/ and test/ with class folders

All networks see the same images and augmentation for as many epochs, with the same optimiser, and have about as many
multiply-adds per image (printed first). XCiT is also distilled from the ResNet of the same seed; on CIFAR-10 DINO
trains an XCiT and a ViT too. Every run uses one thread; --parallel of them run at a time. Numbers are those of the last
epoch, mean and standard deviation over the seeds.
"""

from pathlib import Path

from torch import nn

from tests.evidence import dino
from tests.evidence.claims import CONFIRMED, CONTRADICTED, Claim
from tests.evidence.runs import DISTILLED, Variant, beside_others, beside_vit, main, run_all, table, with_images, write
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
RATES = (0.002, 0.004, 0.008)
CIFAR10 = (
    f"{RUN} --input-size 48 --epochs 5 --batch-size 64 --lr 0.004 --warmup-epochs 0 --aa none --mixup 0.2 --cutmix 1"
)
VARIANTS = [Variant(name, f"{flags} {DIGITS}") for name, flags in NETWORKS.items()]
CIFAR10_VARIANTS = [Variant(name, f"{flags} {CIFAR10}") for name, flags in NETWORKS.items()]
# a ResNet's learning rate is too large for it
DINO = f"{dino.CIFAR10} --lr 0.0005 --weight_decay 0.04 --weight_decay_end 0.4"
SELF_SUPERVISED = [
    Variant("DINO, XCiT-N12/8", f"{DINO} --arch xcit_nano_12_p8", "main_dino.py"),
    Variant("DINO, ViT-Ti/8", f"{DINO} --arch vit_tiny --patch_size 8", "main_dino.py"),
]
SETS = {"digits": "digits", "cifar10": "CIFAR-10, 5 epochs"}
UNTUNED = "the ViT hardly trains at this rate"
# fmt: off
CLAIMS = [
    Claim("time grows linearly with tokens (3.2)", "S12/16 beside a ViT of equal size, 96 to 1,024 pixels",
          numbers="faster from 282 pixels (training: 449); 1.7 and 2.7 times at 1,024", found=CONFIRMED),
    Claim("so does memory, which self-attention's does not", "the same, fused attention",
          numbers="both linear; training takes 1.8 times as much", found=CONTRADICTED),
    Claim("as good as self-attention", "digits, beside a ViT, the best of three rates each", "xcit_tuned", "XCiT",
          "ViT", "acc1", flaw="the ViT hardly trains at any of them"),
    Claim("the same", "CIFAR-10, 5 epochs, one rate", "xcit_cifar10", "XCiT", "ViT", "acc1", flaw=UNTUNED),
    *(Claim("as good as convolutions", f"{data}, ResNet, within a point", f"xcit_{name}", "XCiT", "ResNet", "acc1",
            within=1) for name, data in SETS.items()),
    *(Claim("distillation helps", f"{data}, from that ResNet", f"xcit_{name}", f"XCiT, {DISTILLED}", "XCiT", "acc1")
      for name, data in SETS.items()),
    Claim("DINO works with it", "CIFAR-10, 5 epochs, k-NN", "xcit_cifar10_dino", "DINO, XCiT-N12/8", metric="knn_last",
          beside="knn_before"),
    Claim("ImageNet, also at larger sizes and with smaller patches"),
    Claim("robustness to the size of the images"),
    Claim("detection and segmentation"),
]
# fmt: on


def build(flags: list[str]) -> tuple[nn.Module, int]:
    """The network and the side of its images."""
    args = parse_args(flags)
    return build_network(args.model, 10, img_size=args.input_size), args.input_size


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    beside_others("xcit", VARIANTS, build, "resnet10t", out / "digits", parallel, seeds)
    beside_vit("xcit", VARIANTS[:2], RATES, out, parallel, seeds)


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train_images: Path, test_images: Path) -> None:
    images = (str(train_images), str(test_images))
    beside_others("xcit", with_images(CIFAR10_VARIANTS, images), build, "resnet10t", out / "cifar10", parallel, seeds)
    results = run_all("dino", with_images(SELF_SUPERVISED, images), out / "dino", parallel, seeds)
    write(out, "xcit_cifar10_dino", results, table(results, {"knn_before": "k-NN before", "knn_last": "k-NN after"}))


if __name__ == "__main__":
    main(__doc__, "xcit", claims, cifar10)
