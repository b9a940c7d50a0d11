"""The small experiments behind msn/RESULTS.md: the paper's claims on the digits, and CIFAR-10 at small scale.

    make evidence METHOD=msn                                          # the claims, about an hour on one core
    python tests/evidence/msn.py --only cifar10 --cifar10 DIR         # DIR holds train/ and test/ with class folders

Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch, mean and standard
deviation over the seeds. Low-shot accuracies are logistic regression on frozen features of 1, 2 and 5 images per class,
mean over three draws. DINO gets the compute of MSN.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

from dino import hub as dino_hub
from msn.hub import MEAN, STD, load_pretrained
from msn.logistic_eval import LastClassToken, LowShotClassifier, draw_per_class
from msn.main import build_encoder, parse_args
from shared.evaluation.features import extract_features
from shared.evaluation.knn import knn_classify
from shared.images.labelled import open_labelled
from shared.images.loading import EvalDataset, EvalTransform
from tests.evidence.runs import Pixels, Variant, main, once, run_all, spread, table, write

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHOTS = (1, 2, 5)
SPLITS = 3
EPOCHS = 8  # of the runs on the digits
LAMBD = 0.0025
DIGITS = (
    "--data_path digits "
    "--model_name deit_micro --rand_size 16 --focal_size 12 --focal_views 1 --rand_scale 0.8 1 --focal_scale 0.4 0.7 "
    "--color_jitter_strength 0.2 --blur_radius 0.1 0.3 --num_proto 64 --start_sharpen 0.1 --final_sharpen 0.1 "
    "--hidden_dim 256 --output_dim 64 --batch_size 32 --warmup 1 --start_lr 0.0001 --ema 0.96 1 --num_workers 0 "
    "--pictures off --checkpoint_freq 0 --log_freq 44"
)
CLAIMS = {
    "MSN, a mask of 0.15": "",
    "no mask": "--patch_drop 0",
    "a mask of 0.3": "--patch_drop 0.3",
    "a mask of 0.5": "--patch_drop 0.5",
    "a mask of 0.7": "--patch_drop 0.7",
    "random anchors only": "--focal_views 0 --rand_views 2",
    "focal anchors only": "--rand_views 0 --focal_views 2 --patch_drop 0",
    "neither Sinkhorn nor me-max": "--use_sinkhorn false --me_max false",
    "me-max without Sinkhorn": "--use_sinkhorn false --memax_weight 5",
    "Sinkhorn without me-max": "--me_max false",
    "no sharpening": "--start_sharpen 1 --final_sharpen 1",
    "a prior with a long tail": "--use_sinkhorn false --memax_weight 5 --power_law_exponent 0.25",
}
# Tokens of an image that pass through the network, where a backward pass counts as two forward ones. MSN: 17 of the
# target, 15 of the random anchor and 10 of the focal one. DINO: 17 of two large crops, twice, and 10 of the small one.
MSN_TOKENS, DINO_TOKENS = 17 + 3 * (15 + 10), 2 * 17 + 3 * (2 * 17 + 10)
AGAINST_DINO = "--model_name deit_tiny --patch_size 4 --lr 0.0003"
DINO = (
    "--data_path digits --drop_path_rate 0 "
    "--arch vit_tiny --patch_size 4 --global_crop_size 16 --local_crop_size 12 --local_crops_number 1 --out_dim 256 "
    "--global_crops_scale 0.8 1 --local_crops_scale 0.4 0.7 --blur_radius 0.1 0.3 --batch_size_per_gpu 32 "
    "--lr 0.0005 --warmup_epochs 1 --freeze_last_layer 0 --teacher_temp 0.015 --warmup_teacher_temp 0.015 "
    "--momentum_teacher 0.96 --momentum_teacher_end 0.99 --center_momentum 0.2 --num_workers 0 --pictures off "
    "--saveckp_freq 0 --log_freq 44"
)
CIFAR10 = (
    "--model_name deit_tiny --patch_size 8 --rand_size 32 --focal_size 16 --focal_views 4 --rand_scale 0.5 1 "
    "--focal_scale 0.2 0.5 --blur_radius 0.1 0.5 --num_proto 256 --hidden_dim 512 --output_dim 128 --batch_size 64 "
    "--start_sharpen 0.1 --final_sharpen 0.1 --epochs 5 --warmup 0.3 --ema 0.96 1 --num_workers 0 --pictures off "
    "--checkpoint_freq 0 --log_freq 25"
)


def features_of(backbone: torch.nn.Module, data_path: str | None, val_path: str | None, image_size: int) -> list:
    """Train source, val features and labels, train features and labels."""
    train, val = open_labelled(data_path, val_path)
    transform = EvalTransform(round(image_size * 256 / 224), image_size, MEAN, STD, interpolation="bilinear")
    backbone = backbone.to(DEVICE)
    found = [extract_features(backbone, EvalDataset(source, transform), DEVICE) for source in (val, train)]
    return [train, *(tensor.cpu() for pair in found for tensor in pair)]


def low_shot(backbone: torch.nn.Module, *data) -> dict[str, float]:
    """Top-1 by number of labelled images per class, mean over the draws."""
    train, val_features, val_labels, features, labels = features_of(backbone, *data)
    accuracies = {}
    for shots in SHOTS:
        top1 = []
        for split in range(SPLITS):
            rows = torch.from_numpy(draw_per_class(train, shots, 0, split))
            classifier = LowShotClassifier(features[rows], labels[rows], LAMBD)
            top1.append(classifier.accuracy(val_features, val_labels))
        accuracies[f"knn_{shots}"] = sum(top1) / len(top1)  # named so that the table shows per cent
    return accuracies


def low_shot_of(result: dict, model_name: str, *data) -> dict[str, float]:
    """:func:`low_shot` of a training of MSN."""
    run = result["run"]
    inputs = [result["command"], *map(str, data)]
    return once(run.with_suffix(".low_shot.json"), inputs, lambda: low_shot(msn_backbone(run, model_name), *data))


def msn_backbone(run: Path, model_name: str) -> torch.nn.Module:
    return LastClassToken(load_pretrained(model_name, run).encoder)


COLUMNS = {
    "knn_before": "k-NN before",
    "knn_last": "k-NN after",
    "knn_1": "1 image",
    "knn_2": "2 images",
    "knn_5": "5 images",
    "information": "information",
    "me_max": "me-max",
    "feature_spread": "feature spread",
    "images_per_s": "images/s",
}


def random_weights(flags: str, seeds: tuple[int, ...], *data) -> str:
    """Low-shot accuracy before any training."""
    args, found = parse_args(flags.split()), []
    for seed in seeds:
        torch.manual_seed(seed)
        found.append(low_shot(LastClassToken(build_encoder(args)), *data))
    return "\n\nRandom weights: low-shot " + ", ".join(spread([few[f"knn_{s}"] for few in found]) for s in SHOTS)


def pixels_line(*data) -> str:
    _, val_features, val_labels, features, labels = features_of(Pixels(), *data)
    few = low_shot(Pixels(), *data)
    knn = knn_classify(features, labels, val_features, val_labels, k=20)[0]
    return f"\n\nRaw pixels: k-NN {knn:.1f}, low-shot " + ", ".join(f"{few[f'knn_{s}']:.1f}" for s in SHOTS)


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    variants = [Variant(name, f"{DIGITS} --epochs {EPOCHS} {flags}") for name, flags in CLAIMS.items()]
    results = run_all("msn", variants, out / "digits", parallel, seeds)
    for result in results:
        result |= low_shot_of(result, "deit_micro", "digits", None, 16)
    text = table(results, COLUMNS) + random_weights(DIGITS, seeds, "digits", None, 16) + pixels_line("digits", None, 16)
    write(out, "msn_digits", results, text)
    against_dino(out, parallel, seeds)


def against_dino(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    """ViT-tiny trained by MSN, and by DINO with as much compute."""
    folder = out / "against_dino"
    ours = Variant(f"MSN, {EPOCHS} epochs", f"{DIGITS} {AGAINST_DINO} --epochs {EPOCHS}")
    results = run_all("msn", [ours], folder, parallel, seeds)
    for result in results:
        result |= low_shot_of(result, "deit_tiny", "digits", None, 16)
    as_many = max(1, round(EPOCHS * MSN_TOKENS / DINO_TOKENS))
    theirs = Variant(f"DINO, {as_many} epochs", f"{DINO} --epochs {as_many}")
    for result in run_all("dino", [theirs], folder, parallel, seeds):
        backbone, _ = dino_hub.load_pretrained("vit_tiny", 4, result["run"] / "checkpoint.pth")
        results.append(result | low_shot(backbone, "digits", None, 16))
    columns = {name: COLUMNS[name] for name in ("knn_before", "knn_last", "knn_1", "knn_2", "knn_5", "feature_spread")}
    write(out, "msn_against_dino", results, table(results, columns))


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train: Path, test: Path) -> None:
    flags = f"{CIFAR10} --data_path {train} --val_path {test}"
    results = run_all("msn", [Variant("CIFAR-10", flags)], out, parallel, seeds)
    for result in results:
        result |= low_shot_of(result, "deit_tiny", str(train), str(test), 32)
    data = (str(train), str(test), 32)
    text = table(results, COLUMNS) + random_weights(flags, seeds, *data) + pixels_line(*data)
    write(out, "msn_cifar10", results, text)


if __name__ == "__main__":
    main(__doc__, "msn", claims, cifar10)
