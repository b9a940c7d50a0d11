"""The small experiments behind paws/README.md: the paper's claims on the digits, and CIFAR-10 at small scale.

    make evidence METHOD=paws                                         # the claims, about 30 core-minutes
    python -m tests.evidence.paws --only cifar10 --cifar10 DIR        # DIR holds train/ and test/ with class folders

Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch, mean and standard
deviation over the seeds, which also draw the labels. "Before" is the soft nearest-neighbour accuracy of random weights.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV

from paws.augmentations import RECIPES, choose_recipe
from paws.evaluation import open_validation
from paws.few_labels import pixel_accuracy
from paws.hub import CARD
from paws.labels import open_partly_labelled
from shared.networks.pretrained import load_pretrained
from shared.run.log import read_log
from swav.hub import CARD as SWAV_CARD
from tests.evidence.claims import Claim
from tests.evidence.probe import Features, Images
from tests.evidence.runs import Variant, in_parallel, machine, main, once, run, run_all, run_script, table, write
from tests.evidence.swav import SWAV

QUIET = "--num_workers 0 --pictures off --log_freq 44 --checkpoint_freq 0"
DIGITS = (
    f"{QUIET} --data_path digits --dataset digits --labels_per_class 4 --color_jitter_strength 0.5 --multicrop 2 "
    "--supervised_imgs_per_class 4 --supervised_views 4 --unsupervised_batch_size 64 --model_name wide_resnet10w1 "
    "--output_dim 64 --epochs 20 --lr 0.8 --start_lr 0.1 --final_lr 0.008 --warmup 4"
)
PAWS = "PAWS, 4 labels of each class"
VARIANTS = [
    Variant(PAWS, DIGITS),
    Variant("without me-max", f"{DIGITS} --me_max false"),
    Variant("without sharpening", f"{DIGITS} --sharpen 1"),
    Variant("without either", f"{DIGITS} --me_max false --sharpen 1"),
    Variant("without small views", f"{DIGITS} --multicrop 0"),
    Variant("with a prediction head", f"{DIGITS} --use_pred_head true"),
    Variant("1 view of every support, not 4", f"{DIGITS} --supervised_views 1"),
    Variant("half of the epochs", f"{DIGITS} --epochs 10"),
]
NUMBERS_OF_LABELS = (1, 4, 10)
COLUMNS = {
    "knn_before": "before",
    "knn_last": "after",
    "certainty": "certainty",
    "mean_entropy": "entropy of the mean",
    "feature_spread": "feature spread",
}

BATCH = 64
CIFAR10_EPOCHS = 10
CIFAR10 = (
    f"{QUIET} --dataset cifar10 --output_dim 128 --color_jitter_strength 0.5 --multicrop 0 "
    f"--unsupervised_batch_size {BATCH} --supervised_imgs_per_class 16 --supervised_views 1 "
    "--lr 0.4 --start_lr 0.4 --final_lr 0.004 --warmup 0"
)
CIFAR10_NETWORK = "wide_resnet28w2"
CIFAR10_LABELS = (4000, 1000, 250)
SUPERVISED_STEPS = 400
# Network, images, epochs, number and sizes of the views are those of SwAV's run.
BESIDE_SWAV, LABELS_BESIDE_SWAV, STEPS_BESIDE_SWAV = "resnet10t", 250, 1250
BESIDE_SWAV_RUN = f"{CIFAR10} --model_name {BESIDE_SWAV} --multicrop 4 --small_image_size 16 --epochs 5"
INVERSE_REGULARISATIONS = tuple(10.0**power for power in range(-3, 4))


# fmt: off
CLAIMS = [
    *(Claim("above the labels alone", f"digits, {n} a class", "paws_digits", f"{n} labels",
            f"supervised, {n} labels", "knn_last", "top1") for n in NUMBERS_OF_LABELS),
    Claim("the same", f"CIFAR-10, {', '.join(map(str, CIFAR10_LABELS))} labels", "paws_cifar10",
          tuple(f"PAWS, {CIFAR10_NETWORK}, {n} labels, 10 epochs" for n in CIFAR10_LABELS),
          tuple(f"supervised, {n} labels" for n in CIFAR10_LABELS), "knn_last", "top1", flaw="six times the steps"),
    Claim("fewer epochs than methods without labels", "CIFAR-10, 5 epochs, 250 labels, SwAV", "paws_beside_swav",
          "PAWS", "SwAV", "linear"),
    Claim("above the labels alone", "CIFAR-10, 250 labels, equal steps", "paws_beside_swav", "PAWS",
          "supervised, 250 labels", "knn_last", "top1"),
    Claim("me-max keeps all classes in use (3)", "digits, 4 labels", "paws_digits", PAWS, "without me-max", "knn_last"),
    Claim("sharpening prevents the collapse", "the same", "paws_digits", PAWS, "without sharpening", "knn_last"),
    Claim("small views help", "the same", "paws_digits", PAWS, "without small views", "knn_last"),
    Claim("more views of the supports help", "4 beside 1", "paws_digits", PAWS, "1 view of every support, not 4",
          "knn_last"),
    Claim("ImageNet, wide networks, CIFAR-10 at 96 %"),
    Claim("fine-tuning after PAWS"),
    Claim("larger supports"),
]
# fmt: on


def supervised(
    out: Path, name: str, flags: str, labels_per_class: int, epochs: int, seed: int, repeat: int, batch_size: int
) -> dict:
    """The same network trained on the labels alone, with the views of the supports."""
    folder = out / "supervised" / f"{labels_per_class}-{epochs}" / str(seed)
    command = (
        f"fine_tune.py {flags} --pretrained random --views strong --zero_init false --lr 0.03 --epochs {epochs} "
        f"--labels_per_class {labels_per_class} --data_seed {seed} --seed {seed} --repeat {repeat} --num_workers 0 "
        f"--batch_size {batch_size} --output_dir {folder}"
    )

    def train() -> dict:
        run_script("paws", command.split(), folder.with_suffix(".log"))
        top1 = [line["top1"] for line in read_log(folder / "paws-fine-tune.jsonl") if "top1" in line][-1]
        row = {"variant": f"supervised, {name} labels", "seed": seed, "top1": top1}
        return row | {"command": f"python {command}", "machine": machine()}

    return once(folder.with_suffix(".json"), command.split(), train)


def pixels(images: Images, name: str, labels_per_class: int, seed: int, dataset: str) -> dict:
    """Nearest labelled image by its pixels."""
    labelled = open_partly_labelled(images[0], labels_per_class=labels_per_class, data_seed=seed)
    top1 = pixel_accuracy(labelled, open_validation(labelled, *images), choose_recipe(dataset))
    return {"variant": f"pixels, {name} labels", "seed": seed, "top1": top1}


def with_data_seeds(variants: list[Variant], out: Path, parallel: int, seeds: tuple[int, ...]) -> list[dict]:
    """Every variant with every seed, which is also that of the labels."""

    def train(job: tuple[Variant, int]) -> dict:
        variant, seed = job
        drawn = Variant(variant.name, f"{variant.flags} --data_seed {seed}")
        return run("paws", drawn, seed, out / variant.name.replace(" ", "_") / str(seed))

    return in_parallel(train, [(variant, seed) for variant in variants for seed in seeds], parallel)


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    results = with_data_seeds(VARIANTS, out / "digits", parallel, seeds)
    text = table(results, COLUMNS)
    numbers = [
        Variant(f"{n} labels", f"{DIGITS} --labels_per_class {n} --supervised_imgs_per_class {min(n, 4)}")
        for n in NUMBERS_OF_LABELS
    ]
    few = with_data_seeds(numbers, out / "labels", parallel, seeds)
    epochs = 1 + next(r for r in few if r["seed"] == seeds[0])["epoch"]
    digits = "--data_path digits --dataset digits --model_name wide_resnet10w1 --color_jitter_strength 0.5"
    for n in NUMBERS_OF_LABELS:
        alone = partial(supervised, out, n, digits, n, epochs, repeat=22, batch_size=10 * n)
        few += in_parallel(lambda seed, alone=alone: alone(seed=seed), seeds, parallel)
        few += [pixels(("digits", None), n, n, seed, "digits") for seed in seeds]
    text += "\n\n" + table(few, {"knn_last": "PAWS", "top1": "labels alone, or 1-NN on pixels"})
    write(out, "paws_digits", results + few, text)


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train: Path, test: Path) -> None:
    images = f"--data_path {train} --val_path {test}"
    beside_swav(out, parallel, seeds, (str(train), str(test)))
    here = out / "cifar10"

    def paws(labels: int, seed: int) -> dict:
        flags = f"{CIFAR10} {images} --labels_per_class {labels // 10} --data_seed {seed} --epochs {CIFAR10_EPOCHS}"
        variant = Variant(f"PAWS, {CIFAR10_NETWORK}, {labels} labels, {CIFAR10_EPOCHS} epochs", flags)
        return run("paws", variant, seed, here / f"{CIFAR10_NETWORK}-{labels}-{CIFAR10_EPOCHS}" / str(seed))

    def alone(labels: int, seed: int) -> dict:
        return labels_alone(here, CIFAR10_NETWORK, labels, SUPERVISED_STEPS, seed, images)

    # the longest first
    jobs = [partial(train, labels, seed) for train in (paws, alone) for labels in CIFAR10_LABELS for seed in seeds]
    results, data = in_parallel(lambda job: job(), jobs, parallel), (str(train), str(test))
    results += [pixels(data, n, n // 10, seed, "cifar10") for n in CIFAR10_LABELS for seed in seeds]
    columns = {"knn_last": "soft nearest neighbours", "top1": "labels alone, or 1-NN on pixels"}
    write(out, "paws_cifar10", results, table(results, columns))


def labels_alone(out: Path, network: str, labels: int, steps: int, seed: int, images: str) -> dict:
    """Steps of as many images as the unlabelled ones of a step of PAWS."""
    flags = f"--dataset cifar10 --model_name {network} --color_jitter_strength 0.5 {images}"
    repeat = round(steps * BATCH / labels)  # one epoch: it ends with the only validation
    return supervised(out, labels, flags, labels // 10, 1, seed, repeat, BATCH)


def beside_swav(out: Path, parallel: int, seeds: tuple[int, ...], images: Images) -> None:
    """PAWS, SwAV with a classifier on the same labels, and those labels alone: one network, equal epochs."""
    here, flags = out / "beside_swav", f"--data_path {images[0]} --val_path {images[1]}"
    paws = f"{BESIDE_SWAV_RUN} {flags} --labels_per_class {LABELS_BESIDE_SWAV // 10}"
    results = with_data_seeds([Variant("PAWS", paws)], here, parallel, seeds)
    results += run_all("swav", [Variant("SwAV", f"{SWAV} {flags}")], here, parallel, seeds)

    def classify(result: dict) -> dict:
        """With the accuracy of a classifier on the features of the labelled images."""
        method, file = result["variant"].lower(), result["run"].with_suffix(".linear.json")
        card = (
            replace(CARD, mean=RECIPES["cifar10"].mean, std=RECIPES["cifar10"].std) if method == "paws" else SWAV_CARD
        )
        weights = result["run"] / ("paws-latest.pth.tar" if method == "paws" else "checkpoint.pth.tar")

        def work() -> dict:
            features = Features(card, load_pretrained(card, BESIDE_SWAV, weights), images, 32)
            drawn = {"labels_per_class": LABELS_BESIDE_SWAV // 10, "data_seed": result["seed"]}
            return {"linear": few_labels(features, open_partly_labelled(images[0], **drawn).labelled)}

        return result | once(file, [result["command"], *map(str, INVERSE_REGULARISATIONS)], work)

    results = in_parallel(classify, results, parallel)
    alone = partial(labels_alone, here, BESIDE_SWAV, LABELS_BESIDE_SWAV, STEPS_BESIDE_SWAV, images=flags)
    results += in_parallel(lambda seed: alone(seed=seed), seeds, parallel)
    columns = {"knn_last": "soft nearest neighbours, k-NN", "linear": "linear, the same labels", "top1": "labels alone"}
    write(out, "paws_beside_swav", results, table(results, columns))


def few_labels(features: Features, rows: np.ndarray) -> float:
    """Top-1 in percent of logistic regression on some training images, its regularisation by cross-validation."""
    train, test = (F.normalize(values, dim=1).numpy() for values in (features.train[rows], features.val))
    chosen = GridSearchCV(LogisticRegression(max_iter=5000), {"C": INVERSE_REGULARISATIONS}, cv=5)
    return 100 * chosen.fit(train, features.train_labels[rows].numpy()).score(test, features.val_labels.numpy())


if __name__ == "__main__":
    main(__doc__, "paws", claims, cifar10)
