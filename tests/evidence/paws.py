"""The small experiments behind paws/README.md: the paper's claims on the embedded digits, and CIFAR-10 at small scale.

    make evidence METHOD=paws                                         # the claims, about 30 core-minutes
    python tests/evidence/paws.py --only cifar10 --cifar10 DIR        # DIR holds train/ and test/ with class folders

Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch, mean and standard
deviation over the seeds, which also draw the labels. "Before" is the soft nearest-neighbour accuracy of random weights.
"""

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from paws.augmentations import choose_recipe
from paws.evaluation import open_validation
from paws.few_labels import pixel_accuracy
from paws.labels import open_partly_labelled
from shared.run.log import read_log
from tests.evidence.runs import (
    Variant,
    in_parallel,
    linear,
    main,
    once,
    run,
    run_script,
    spread,
    table,
    write,
)

QUIET = "--num_workers 0 --pictures off --log_freq 44 --checkpoint_freq 0"
DIGITS = (
    f"{QUIET} --data_path digits --dataset digits --labels_per_class 4 --color_jitter_strength 0.5 --multicrop 2 "
    "--supervised_imgs_per_class 4 --supervised_views 4 --unsupervised_batch_size 64 --model_name wide_resnet10w1 "
    "--output_dim 64 --epochs 20 --lr 0.8 --start_lr 0.1 --final_lr 0.008 --warmup 4"
)
CLAIMS = [
    Variant("PAWS, 4 labels of each class", DIGITS),
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
BESIDE_SWAV = "resnet10t"  # the network of both
LABELS_BESIDE_SWAV = 1000
SWAV = (
    f"--arch {BESIDE_SWAV} --nmb_crops 2 --size_crops 32 --min_scale_crops 0.3 --max_scale_crops 1 "
    "--blur_radius 0.1 0.5 --hidden_mlp 512 --nmb_prototypes 100 --batch_size 64 --base_lr 1.2 --warmup_epochs 0 "
    "--freeze_prototypes_niters 100 --workers 0 --pictures off --checkpoint_freq 0 --log_freq 25"
)


def supervised(
    out: Path, flags: str, labels_per_class: int, epochs: int, seed: int, repeat: int, batch_size: int
) -> float:
    """Accuracy of the same network trained on the labels alone, with the views of the supports."""
    folder = out / "supervised" / f"{labels_per_class}-{epochs}" / str(seed)
    command = (
        f"fine_tune.py {flags} --pretrained random --views strong --zero_init false --lr 0.03 --epochs {epochs} "
        f"--labels_per_class {labels_per_class} --data_seed {seed} --seed {seed} --repeat {repeat} --num_workers 0 "
        f"--batch_size {batch_size} --output_dir {folder}"
    )

    def train() -> dict:
        run_script("paws", command.split(), folder.with_suffix(".log"))
        return {"top1": [line["top1"] for line in read_log(folder / "paws-fine-tune.jsonl") if "top1" in line][-1]}

    return once(folder.with_suffix(".json"), command.split(), train)["top1"]


def pixels(data_path: str | None, val_path: str | None, labels_per_class: int, seed: int, dataset: str) -> float:
    """Nearest labelled image by its pixels."""
    images = open_partly_labelled(data_path, labels_per_class=labels_per_class, data_seed=seed)
    return pixel_accuracy(images, open_validation(images, data_path, val_path), choose_recipe(dataset))


def with_data_seeds(variants: list[Variant], out: Path, parallel: int, seeds: tuple[int, ...]) -> list[dict]:
    """Every variant with every seed, which is also that of the labels."""

    def train(job: tuple[Variant, int]) -> dict:
        variant, seed = job
        drawn = Variant(variant.name, f"{variant.flags} --data_seed {seed}")
        return run("paws", drawn, seed, out / variant.name.replace(" ", "_") / str(seed))

    return in_parallel(train, [(variant, seed) for variant in variants for seed in seeds], parallel)


def claims(out: Path, parallel: int, seeds: tuple[int, ...]) -> None:
    results = with_data_seeds(CLAIMS, out / "digits", parallel, seeds)
    text = table(results, COLUMNS)
    numbers = [
        Variant(f"{n} labels", f"{DIGITS} --labels_per_class {n} --supervised_imgs_per_class {min(n, 4)}")
        for n in NUMBERS_OF_LABELS
    ]
    few = with_data_seeds(numbers, out / "labels", parallel, seeds)
    epochs = 1 + next(r for r in few if r["seed"] == seeds[0])["epoch"]
    rows = ["| labels of each class | PAWS | same network, labels alone | 1-NN on pixels |", "|---|---|---|---|"]
    digits = "--data_path digits --dataset digits --model_name wide_resnet10w1 --color_jitter_strength 0.5"
    for n in NUMBERS_OF_LABELS:
        mine = [r["knn_last"] for r in few if r["variant"] == f"{n} labels"]
        alone = in_parallel(lambda seed, n=n: supervised(out, digits, n, epochs, seed, 22, 10 * n), seeds, parallel)
        near = [pixels("digits", None, n, seed, "digits") for seed in seeds]
        rows.append(f"| {n} | {spread(mine)} | {spread(alone)} | {spread(near)} |")
        few.append({"variant": f"{n} labels", "supervised": alone, "pixels": near})
    write(out, "paws_digits", results + few, text + "\n\n" + "\n".join(rows))


def swav_with_linear_head(out: Path, images: str, epochs: int, seed: int) -> dict:
    """SwAV, and the accuracy of a linear layer that learns from all labels of its images."""
    variant = Variant(f"SwAV, {BESIDE_SWAV}, {epochs} epochs", f"{SWAV} {images} --epochs {epochs}", "main_swav.py")
    result = run("swav", variant, seed, out / "swav" / str(epochs) / str(seed))
    weights = f"--arch {BESIDE_SWAV} --pretrained {result['run']}/checkpoint.pth.tar"
    flags = f"{weights} {images} --image_size 32 --num_labels 10 --epochs 5 --workers 0 --seed {seed}"
    return result | {"linear": linear("swav", flags, result["run"] / "linear", "log.txt")}


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train: Path, test: Path) -> None:
    images = f"--data_path {train} --val_path {test}"
    here, half = out / "cifar10", CIFAR10_EPOCHS // 2

    def paws(network: str, labels: int, epochs: int, seed: int) -> dict:
        flags = f"--model_name {network} --labels_per_class {labels // 10} --data_seed {seed} --epochs {epochs}"
        variant = Variant(f"PAWS, {network}, {labels} labels, {epochs} epochs", f"{CIFAR10} {images} {flags}")
        return run("paws", variant, seed, here / f"{network}-{labels}-{epochs}" / str(seed))

    def alone(labels: int, seed: int) -> dict:
        """Steps of as many images as the unlabelled ones of a step of PAWS."""
        flags = f"--dataset cifar10 --model_name {CIFAR10_NETWORK} --color_jitter_strength 0.5 {images}"
        repeat = round(SUPERVISED_STEPS * BATCH / labels)  # one epoch: it ends with the only validation
        accuracy = supervised(here, flags, labels // 10, 1, seed, repeat, BATCH)
        return {"variant": f"supervised, {labels} labels", "seed": seed, "top1": accuracy}

    # the longest first
    jobs = [partial(paws, CIFAR10_NETWORK, labels, CIFAR10_EPOCHS, s) for labels in CIFAR10_LABELS for s in seeds]
    jobs += [
        partial(paws, BESIDE_SWAV, LABELS_BESIDE_SWAV, epochs, s) for epochs in (CIFAR10_EPOCHS, half) for s in seeds
    ]
    jobs += [
        partial(swav_with_linear_head, here, images, epochs, s) for epochs in (CIFAR10_EPOCHS, half) for s in seeds
    ]
    jobs += [partial(alone, labels, s) for labels in CIFAR10_LABELS for s in seeds]
    results = in_parallel(lambda job: job(), jobs, parallel)

    def accuracies(variant: str, key: str) -> str:
        return spread([result[key] for result in results if result["variant"] == variant])

    rows = ["| labels | PAWS | same network, labels alone | 1-NN on pixels |", "|---|---|---|---|"]
    for labels in CIFAR10_LABELS:
        mine = accuracies(f"PAWS, {CIFAR10_NETWORK}, {labels} labels, {CIFAR10_EPOCHS} epochs", "knn_last")
        near = [pixels(str(train), str(test), labels // 10, seed, "cifar10") for seed in seeds]
        rows.append(f"| {labels} | {mine} | {accuracies(f'supervised, {labels} labels', 'top1')} | {spread(near)} |")
        results.append({"variant": f"pixels, {labels} labels", "top1": near})
    rows += ["", f"| epochs | PAWS, {LABELS_BESIDE_SWAV} labels | SwAV, linear layer on all labels |", "|---|---|---|"]
    for epochs in (half, CIFAR10_EPOCHS):
        mine = accuracies(f"PAWS, {BESIDE_SWAV}, {LABELS_BESIDE_SWAV} labels, {epochs} epochs", "knn_last")
        rows.append(f"| {epochs} | {mine} | {accuracies(f'SwAV, {BESIDE_SWAV}, {epochs} epochs', 'linear')} |")
    write(out, "paws_cifar10", results, "\n".join(rows))


if __name__ == "__main__":
    main(__doc__, "paws", claims, cifar10)
