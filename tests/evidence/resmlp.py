"""The small experiments of resmlp/RESULTS.md: the paper's claims on the embedded data, and CIFAR-10 at small scale.

    make evidence METHOD=resmlp                                       # the claims, about 40 core-minutes
    python -m tests.evidence.resmlp --only cifar10 --cifar10 DIR      # DIR holds train/ and test/ with class folders

The claims: ResMLP beside a ViT and a ResNet of about equal multiply-adds, and distilled from that ResNet, on the
digits; translation of the generated language pair by ResMLP beside a Transformer of equal size. On CIFAR-10 also the
features that DINO learns with ResMLP. Every run uses one thread; --parallel of them run at a time. Numbers are those of
the last epoch, mean and standard deviation over the seeds.
"""

from pathlib import Path

from torch import nn

from resmlp.hub import build_network
from resmlp.main import parse_args
from shared.run.log import read_log
from tests.evidence.claims import Claim
from tests.evidence.runs import (
    DISTILLED,
    Variant,
    beside_others,
    beside_vit,
    last_values,
    main,
    run_all,
    table,
    with_images,
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
RATES = (0.004, 0.008, 0.016)
CIFAR10 = f"{RUN} --epochs 5 --batch-size 64 --lr 0.004 --warmup-epochs 0 --aa none --reprob 0 --mixup 0.2 --cutmix 1"
SCRIPT = "translation/main.py"
TRANSLATION = "--epochs 12 --log_freq 31 --bleu_freq 1"
GOOD_BLEU = 90
VARIANTS = [Variant(name, f"{flags} {DIGITS}") for name, flags in NETWORKS.items()]
CIFAR10_VARIANTS = [Variant(name, f"{flags} {CIFAR10}") for name, flags in NETWORKS.items()]
TRANSLATION_RATES = {"resmlp": (0.002, 0.008), "transformer": (0.001, 0.002)}  # beside the default, 0.004
TRANSLATORS = [
    Variant(
        f"{name}{rate and f', rate {rate}'}", f"--network {network} {TRANSLATION}{rate and f' --lr {rate}'}", SCRIPT
    )
    for network, name in (("resmlp", "ResMLP translator"), ("transformer", "Transformer of equal size"))
    for rate in ("", *TRANSLATION_RATES[network])
]
DINO = (
    "--arch resmlp_12 --global_crop_size 32 --local_crop_size 32 --local_crops_number 2 --out_dim 1024 "
    "--global_crops_scale 0.5 1 --local_crops_scale 0.2 0.5 --blur_radius 0.1 0.5 --batch_size_per_gpu 64 --lr 0.0005 "
    "--epochs 5 --warmup_epochs 1 --freeze_last_layer 0 --teacher_temp 0.015 --warmup_teacher_temp 0.015 "
    "--momentum_teacher 0.96 --momentum_teacher_end 0.99 --center_momentum 0.2 --num_workers 0 --pictures off "
    "--saveckp_freq 0 --eval_knn_freq 1"
)


SETS = {"digits": "digits", "cifar10": "CIFAR-10, 5 epochs"}
# fmt: off
CLAIMS = [
    Claim("close to networks with attention", "digits, beside a ViT, the best of three rates each, within a point",
          "resmlp_tuned", "ResMLP", "ViT", "acc1", within=1, flaw="the ViT hardly trains at any of them"),
    Claim("the same", "CIFAR-10, 5 epochs, within a point", "resmlp_cifar10", "ResMLP", "ViT", "acc1", within=1),
    *(Claim("a convolutional network knows more beforehand", f"{data}, ResNet-18", f"resmlp_{name}", "ResNet-18",
            "ResMLP", "acc1") for name, data in SETS.items()),
    *(Claim("distillation helps", f"{data}, from that ResNet", f"resmlp_{name}", f"ResMLP, {DISTILLED}", "ResMLP",
            "acc1") for name, data in (SETS | {"cifar10_2_epochs": "CIFAR-10, 2 epochs"}).items()),
    Claim("DINO works with it", "CIFAR-10, 5 epochs, k-NN", "resmlp_cifar10_dino", "DINO with ResMLP-S12",
          metric="knn_last", beside="knn_before"),
    Claim("it translates like a Transformer (3.6)", "generated languages, BLEU, each at the best of three rates",
          "resmlp_translation", "ResMLP translator, rate 0.008", "Transformer of equal size, rate 0.002", "bleu"),
    Claim("the same", "epochs to BLEU 90, fewer than it", "resmlp_translation", "Transformer of equal size, rate 0.002",
          "ResMLP translator, rate 0.008", "epochs_to_90"),
    Claim("ImageNet, WMT"),
    Claim("transfer to other data"),
    Claim("ablations: affine layers, LayerScale, other mixing"),
]
# fmt: on


def build(flags: list[str]) -> tuple[nn.Module, int]:
    """The network and the side of its images."""
    args = parse_args(flags)
    sizes = {"patch_size": args.patch_size, "embed_dim": args.embed_dim, "depth": args.depth}
    return build_network(args.model, 10, args.input_size, **sizes), args.input_size


def translator(output_dir: Path) -> dict:
    """BLEU of the test part, which the script prints at its end, that of the valid part and losses.

    ``epochs_to_90`` are those until the valid part reaches it, one more than there were if it does not.
    """
    last, lines = last_values(output_dir), read_log(output_dir / "metrics.jsonl")
    bleu = float(output_dir.with_suffix(".log").read_text().split(", test: BLEU = ")[1].split()[0])
    by_epoch = [line["valid_bleu"] for line in lines if "valid_bleu" in line]
    good = [epoch for epoch, value in enumerate(by_epoch, 1) if value >= GOOD_BLEU]
    found = {"bleu": bleu, "bleu_valid": by_epoch[-1], "epochs_to_90": min(good, default=len(by_epoch) + 1)}
    return found | {"loss": last["loss"], "valid_loss": last["valid_loss"]}


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    beside_others("resmlp", VARIANTS, build, "resnet18", out / "digits", parallel, seeds)
    beside_vit("resmlp", VARIANTS[:2], RATES, out, parallel, seeds)
    translated = run_all("resmlp", TRANSLATORS, out / "translation", parallel, seeds, translator)
    columns = {
        "bleu": "BLEU",
        "bleu_valid": "BLEU, valid",
        "epochs_to_90": "epochs to 90",
        "valid_loss": "loss per token, valid",
        "loss": "smoothed loss, train",
    }
    write(out, "resmlp_translation", translated, table(translated, columns))


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train_images: Path, test_images: Path) -> None:
    images = (str(train_images), str(test_images))
    for epochs in (5, 2):
        variants = [Variant(v.name, f"{v.flags} --epochs {epochs}") for v in CIFAR10_VARIANTS]
        name = "cifar10" if epochs == 5 else f"cifar10_{epochs}_epochs"
        beside_others("resmlp", with_images(variants, images), build, "resnet18", out / name, parallel, seeds)
    variants = with_images([Variant("DINO with ResMLP-S12", DINO, "main_dino.py")], images)
    results = run_all("dino", variants, out / "cifar10/dino", parallel, seeds)
    write(out, "resmlp_cifar10_dino", results, table(results, {"knn_before": "k-NN before", "knn_last": "k-NN after"}))


if __name__ == "__main__":
    main(__doc__, "resmlp", claims, cifar10)
