"""The small experiments behind msn/RESULTS.md: the paper's claims on the digits, and CIFAR-10 at small scale.

    make evidence METHOD=msn                                          # the claims, about an hour on one core
    python -m tests.evidence.msn --only cifar10 --cifar10 DIR         # DIR holds train/ and test/ with class folders

Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch, mean and standard
deviation over the seeds. Low-shot accuracies are logistic regression on frozen features of 1, 2 and 5 images per class,
mean over three draws. DINO gets the compute of MSN.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dino import hub as dino_hub
from msn.hub import CARD, load_pretrained
from msn.logistic_eval import LastClassToken, LowShotClassifier, draw_per_class
from msn.main import build_encoder, parse_args
from tests.evidence.claims import CONFIRMED, Claim
from tests.evidence.probe import Features, Images, Pixels
from tests.evidence.runs import Variant, further_materials, main, once, run_all, table, tuned, with_images, write

EMBEDDED: Images = ("digits", None)
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
MSN = "MSN, a mask of 0.15"
VARIANTS = {
    MSN: "",
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
# On the generated images both have their own views and losses of main.py, and ViT-tiny with patches of 4.
BESIDE = "--num_workers 0 --pictures off --log_freq 60 --patch_size 4"
BOTH = {
    "MSN": f"{BESIDE} --checkpoint_freq 0 --model_name deit_tiny --rand_size 24 --focal_size 12",
    "DINO": f"{BESIDE} --arch vit_tiny --global_crop_size 24 --local_crop_size 12",
}
# Tokens of an image that pass through the network, where a backward pass counts as two forward ones. MSN: 37 of the
# target, 32 of the random anchor and twice 10 of the focal ones. DINO: 37 of two large crops, twice, and 10 of two
# small ones.
MSN_TOKENS, DINO_TOKENS = 37 + 3 * (32 + 2 * 10), 2 * 37 + 3 * (2 * 37 + 2 * 10)
DINO_EPOCHS = 5
AS_LONG = {"MSN": round(DINO_EPOCHS * DINO_TOKENS / MSN_TOKENS), "DINO": DINO_EPOCHS}
RATES = {"MSN": (0.00025, 0.0005, 0.001), "DINO": (0.002, 0.004, 0.008)}  # DINO's are of 256 images, these are 32
CIFAR10 = (
    "--model_name deit_tiny --patch_size 8 --rand_size 32 --focal_size 16 --focal_views 4 --rand_scale 0.5 1 "
    "--focal_scale 0.2 0.5 --blur_radius 0.1 0.5 --num_proto 256 --hidden_dim 512 --output_dim 128 --batch_size 64 "
    "--start_sharpen 0.1 --final_sharpen 0.1 --epochs 5 --warmup 0.3 --ema 0.96 1 --num_workers 0 --pictures off "
    "--checkpoint_freq 0 --log_freq 25"
)


# fmt: off
CLAIMS = [
    Claim("features for few labels (table 1)", "digits, 5 images a class; random weights", "msn_digits", MSN,
          "random weights", "knn_5"),
    Claim("above DINO with few labels", "materials, 5 images, equal compute", "msn_against_dino", "MSN", "DINO",
          "knn_5"),
    Claim("a small mask helps a small ViT (table 6)", "5 images, 0.15; none", "msn_digits", MSN,
          "no mask", "knn_5"),
    Claim("a large one harms it", "0.15; 0.5, 0.7", "msn_digits", MSN, ("a mask of 0.5", "a mask of 0.7"),
          "knn_5"),
    Claim("a mask saves time", "ViT-S/16, [0.7](RESULTS.md#what-a-mask-saves)", numbers="0.35 of the encoder's",
          found=CONFIRMED),
    Claim("both kinds of anchors beat random ones", "5 images", "msn_digits", MSN, "random anchors only",
          "knn_5"),
    Claim("and focal ones", "the same", "msn_digits", MSN, "focal anchors only", "knn_5"),
    Claim("without me-max and Sinkhorn it collapses (3)", "information, nats", "msn_digits", MSN,
          "neither Sinkhorn nor me-max", "information"),
    Claim("me-max helps beside Sinkhorn", "5 images", "msn_digits", MSN, "Sinkhorn without me-max", "knn_5"),
    Claim("me-max of weight 5 replaces Sinkhorn", "5 images", "msn_digits", "me-max without Sinkhorn", MSN,
          "knn_5"),
    Claim("sharpening is needed", "information, nats", "msn_digits", MSN, "no sharpening", "information"),
    Claim("the best mask grows with the network"),
    Claim("ImageNet"),
    Claim("memory on a GPU"),
    Claim("transfer"),
    Claim("robustness"),
    Claim("PMSN on long tails"),
]
# fmt: on


def low_shot(features: Features) -> dict[str, float]:
    """Top-1 by number of labelled images per class, mean over the draws."""
    accuracies = {}
    for shots in SHOTS:
        top1 = []
        for split in range(SPLITS):
            rows = torch.from_numpy(draw_per_class(features.source, shots, 0, split))
            classifier = LowShotClassifier(features.train[rows], features.train_labels[rows], LAMBD)
            top1.append(classifier.accuracy(features.val, features.val_labels))
        accuracies[f"knn_{shots}"] = sum(top1) / len(top1)  # named so that the table shows per cent
    return accuracies


def with_low_shot(
    results: list[dict], load: Callable[[Path], torch.nn.Module], images: Images, side: int
) -> list[dict]:
    """Results of runs, and :func:`low_shot` of each; ``load`` gives the network of a folder."""

    def measure(result: dict) -> dict:
        file, inputs = result["run"].with_suffix(".low_shot.json"), [result["command"], *map(str, images)]
        return once(file, inputs, lambda: low_shot(Features(CARD, load(result["run"]), images, side)))

    return [result | measure(result) for result in results]


def load(model_name: str, run: Path) -> torch.nn.Module:
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


def baselines(flags: str, seeds: tuple[int, ...], images: Images, side: int) -> list[dict]:
    """Raw pixels and random weights."""
    pixels = Features(CARD, Pixels(), images, side)
    rows = [{"variant": "raw pixels", "knn_last": pixels.knn(), **low_shot(pixels)}]
    for seed in seeds:
        torch.manual_seed(seed)
        random = Features(CARD, LastClassToken(build_encoder(parse_args(flags.split()))), images, side)
        rows.append({"variant": "random weights", "seed": seed, **low_shot(random)})
    return rows


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    variants = [Variant(name, f"{DIGITS} --epochs {EPOCHS} {flags}") for name, flags in VARIANTS.items()]
    results = run_all("msn", variants, out / "digits", parallel, seeds)
    results = with_low_shot(results, partial(load, "deit_micro"), EMBEDDED, 16)
    results += baselines(DIGITS, seeds, EMBEDDED, 16)
    write(out, "msn_digits", results, table(results, COLUMNS))
    against_dino(out, parallel, seeds)


def against_dino(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    """ViT-tiny trained by MSN, and by DINO with as much compute.

    Each has the best of three rates on the 360 embedded images with another seed; 2,400 others are what is reported.
    """
    loads = {
        "MSN": partial(load, "deit_tiny"),
        "DINO": lambda run: dino_hub.load_pretrained("vit_tiny", 4, run / "checkpoint.pth")[0],
    }
    scripts, further = {"MSN": "main.py", "DINO": "main_dino.py"}, str(further_materials(out))
    results = []
    for method, flags in BOTH.items():
        variant = Variant(method, f"{flags} --epochs {AS_LONG[method]}", scripts[method])
        folder, run = out / "against_dino" / method, partial(with_low_shot, load=loads[method], side=24)
        job = (RATES[method], folder, parallel, "knn_5", partial(run, images=(None, None)))
        best, found = tuned(method.lower(), variant, *job)
        results += (
            run(
                run_all(method.lower(), with_images([best], (None, further)), folder, parallel, seeds),
                images=(None, further),
            )
            + found
        )
    for seed in seeds:
        torch.manual_seed(seed)
        network = dino_hub.build("vit_tiny", patch_size=4, img_size=24)
        found = low_shot(Features(CARD, network, (None, further), 24))
        command = f"tests/evidence/msn.py: random weights, seed {seed}"
        results.append({"variant": "random weights", "seed": seed, **found, "command": command})
    columns = {name: COLUMNS[name] for name in ("knn_before", "knn_last", "knn_1", "knn_2", "knn_5", "feature_spread")}
    write(out, "msn_against_dino", results, table(results, columns))


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train: Path, test: Path) -> None:
    flags = f"{CIFAR10} --data_path {train} --val_path {test}"
    images = (str(train), str(test))
    results = run_all("msn", [Variant("CIFAR-10", flags)], out, parallel, seeds)
    results = with_low_shot(results, partial(load, "deit_tiny"), images, 32)
    results += baselines(flags, seeds, images, 32)
    write(out, "msn_cifar10", results, table(results, COLUMNS))


if __name__ == "__main__":
    main(__doc__, "msn", claims, cifar10)
