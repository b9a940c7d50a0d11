"""The small experiments behind paws/README.md: the paper's claims on the embedded digits, and CIFAR-10 at small scale.

    make evidence METHOD=paws                                         # the claims, about 30 core-minutes
    python tests/evidence/paws.py --only cifar10 --cifar10 DIR        # DIR holds train/ and test/ with class folders

Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch, mean and standard
deviation over the seeds, which also draw the labels. "Before" is the soft nearest-neighbour accuracy of random weights.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from paws.augmentations import choose_recipe
from paws.evaluation import open_validation
from paws.few_labels import pixel_accuracy
from paws.labels import open_partly_labelled
from tests.evidence.runs import (
    IMAGES_PER_CLASS,
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
CLAIMS = [
    Variant("PAWS, 4 labels of each class", QUIET),
    Variant("without me-max", f"{QUIET} --me_max false"),
    Variant("without sharpening", f"{QUIET} --sharpen 1"),
    Variant("without either", f"{QUIET} --me_max false --sharpen 1"),
    Variant("without small views", f"{QUIET} --multicrop 0"),
    Variant("with a prediction head", f"{QUIET} --use_pred_head true"),
    Variant("1 view of every support, not 4", f"{QUIET} --supervised_views 1"),
    Variant("half of the epochs", f"{QUIET} --epochs 10"),
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
CIFAR10 = (
    f"{QUIET} --dataset cifar10 --model_name wide_resnet10w1 --output_dim 128 --color_jitter_strength 0.5 "
    f"--multicrop 0 --unsupervised_batch_size {BATCH} --supervised_views 1 --lr 0.4 --start_lr 0.4 --final_lr 0.004 "
    "--warmup 0"
)
CIFAR10_SUPPORTS = 16  # of each class
CIFAR10_RUNS = ((4000, 6), (1000, 6), (250, 6), (1000, 3))  # labels in all, epochs
SWAV = (
    "--arch resnet10t --nmb_crops 2 --size_crops 32 --min_scale_crops 0.3 --max_scale_crops 1 "
    "--blur_radius 0.1 0.5 --hidden_mlp 512 --nmb_prototypes 100 --batch_size 64 --base_lr 1.2 --warmup_epochs 0 "
    "--freeze_prototypes_niters 100 --workers 0 --pictures off --checkpoint_freq 0 --log_freq 25"
)


def supervised(
    out: Path, flags: str, labels_per_class: int, epochs: int, seed: int, repeat: int, batch_size: int
) -> float:
    """The same network trained on the labels alone, with the views of the supports, for as many steps."""
    folder = out / "supervised" / f"{labels_per_class}-{epochs}" / str(seed)
    command = (
        f"fine_tune.py {flags} --pretrained random --views strong --zero_init false --lr 0.03 --epochs {epochs} "
        f"--labels_per_class {labels_per_class} --data_seed {seed} --seed {seed} --repeat {repeat} --num_workers 0 "
        f"--batch_size {batch_size} --output_dir {folder}"
    )

    def train() -> dict:
        run_script("paws", command.split(), folder.with_suffix(".log"))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return {"top1": [line["top1"] for line in lines if "top1" in line][-1]}

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
        Variant(f"{n} labels", f"{QUIET} --labels_per_class {n} --supervised_imgs_per_class {min(n, 4)}")
        for n in NUMBERS_OF_LABELS
    ]
    few = with_data_seeds(numbers, out / "labels", parallel, seeds)
    epochs = 1 + next(r for r in few if r["seed"] == seeds[0])["epoch"]
    rows = ["| labels of each class | PAWS | same network, labels alone | 1-NN on pixels |", "|---|---|---|---|"]
    digits = "--model_name wide_resnet10w1 --color_jitter_strength 0.5"
    for n in NUMBERS_OF_LABELS:
        mine = [r["knn_last"] for r in few if r["variant"] == f"{n} labels"]
        alone = in_parallel(lambda seed, n=n: supervised(out, digits, n, epochs, seed, 22, 10 * n), seeds, parallel)
        near = [pixels(None, None, n, seed, "digits") for seed in seeds]
        rows.append(f"| {n} | {spread(mine)} | {spread(alone)} | {spread(near)} |")
        few.append({"variant": f"{n} labels", "supervised": alone, "pixels": near})
    write(out, "paws_digits", results + few, text + "\n\n" + "\n".join(rows))


def swav_with_linear_head(out: Path, train: Path, test: Path, epochs: int, seed: int) -> float:
    """SwAV for as many epochs on the same images, then a linear layer on all of their labels."""
    images = f"--data_path {train} --val_path {test}"
    variant = Variant(f"SwAV, {epochs} epochs", f"{SWAV} {images} --epochs {epochs}", "main_swav.py")
    folder = run("swav", variant, seed, out / "swav" / str(epochs) / str(seed))["run"]
    flags = f"--arch resnet10t --pretrained {folder}/checkpoint.pth.tar {images} --image_size 32 --num_labels 10"
    return linear("swav", f"{flags} --epochs 1 --workers 0", folder / "linear", "log.txt")


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train: Path, test: Path) -> None:
    images = f"--data_path {train} --val_path {test}"
    steps_per_epoch = 10 * IMAGES_PER_CLASS // BATCH
    network = f"--dataset cifar10 --model_name wide_resnet10w1 --color_jitter_strength 0.5 {images}"
    rows = ["| labels | epochs | PAWS | same network, labels alone | 1-NN on pixels |", "|---|---|---|---|---|"]
    results = []
    for count, epochs in CIFAR10_RUNS:
        repeat = max(1, round(steps_per_epoch * BATCH / count))
        near = [pixels(str(train), str(test), count // 10, seed, "cifar10") for seed in seeds]
        own = f"--labels_per_class {count // 10} --supervised_imgs_per_class {CIFAR10_SUPPORTS} --epochs {epochs}"
        variant = Variant(f"{count} labels, {epochs} epochs", f"{CIFAR10} {images} {own}")
        found = with_data_seeds([variant], out / "cifar10", parallel, seeds)
        job = (out / "cifar10", network, count // 10, epochs)
        alone = in_parallel(lambda seed, job=job, repeat=repeat: supervised(*job, seed, repeat, BATCH), seeds, parallel)
        for result, accuracy in zip(found, alone, strict=True):
            result["supervised"] = accuracy
            result["command"] = result["command"].replace(images, "--data_path cifar10/train --val_path cifar10/test")
        results += found
        mine = spread([result["knn_last"] for result in found])
        rows.append(f"| {count} | {epochs} | {mine} | {spread(alone)} | {spread(near)} |")
    rows += ["", "| SwAV, linear head on all 16,000 labels, epochs | top-1 |", "|---|---|"]
    for epochs in sorted({epochs for _, epochs in CIFAR10_RUNS}):
        job = (out / "cifar10", train, test, epochs)
        accuracies = in_parallel(lambda seed, job=job: swav_with_linear_head(*job, seed), seeds, parallel)
        rows.append(f"| {epochs} | {spread(accuracies)} |")
        results.append({"variant": f"SwAV, {epochs} epochs", "linear": accuracies})
    write(out, "paws_cifar10", results, "\n".join(rows))


if __name__ == "__main__":
    main(__doc__, "paws", claims, cifar10)
