"""The small experiments behind paws/README.md: the paper's claims on the digits, and CIFAR-10 at small scale.

    make evidence METHOD=paws                                         # the claims, about 30 core-minutes
    python -m tests.evidence.paws --only cifar10 --cifar10 DIR        # DIR holds train/ and test/ with class folders

Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch, mean and standard
deviation over the seeds, which also draw the labels. "Before" is the soft nearest-neighbour accuracy of random weights.
"""

from functools import partial
from pathlib import Path

from torch import nn

from paws.augmentations import choose_recipe
from paws.evaluation import open_validation
from paws.few_labels import pixel_accuracy
from paws.labels import open_partly_labelled
from shared.run.log import read_log
from swav.hub import CARD, load_backbone
from tests.evidence.claims import Claim
from tests.evidence.probe import Images, with_linear
from tests.evidence.runs import Variant, in_parallel, machine, main, once, run, run_script, table, write

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
BESIDE_SWAV = "resnet10t"  # the network of both
LABELS_BESIDE_SWAV = 1000
SWAV = (
    f"--arch {BESIDE_SWAV} --nmb_crops 2 --size_crops 32 --min_scale_crops 0.3 --max_scale_crops 1 "
    "--blur_radius 0.1 0.5 --hidden_mlp 512 --nmb_prototypes 100 --batch_size 64 --base_lr 1.2 --warmup_epochs 0 "
    "--freeze_prototypes_niters 100 --workers 0 --pictures off --checkpoint_freq 0 --log_freq 25"
)


# fmt: off
CLAIMS = [
    *(Claim("above the labels alone", f"digits, {n} a class", "paws_digits", f"{n} labels",
            f"supervised, {n} labels", "knn_last", "top1") for n in NUMBERS_OF_LABELS),
    Claim("the same", f"CIFAR-10, {', '.join(map(str, CIFAR10_LABELS))} labels", "paws_cifar10",
          tuple(f"PAWS, {CIFAR10_NETWORK}, {n} labels, 10 epochs" for n in CIFAR10_LABELS),
          tuple(f"supervised, {n} labels" for n in CIFAR10_LABELS), "knn_last", "top1", flaw="six times the steps"),
    Claim("fewer epochs than methods without labels", "CIFAR-10, 10 epochs, SwAV, linear", "paws_cifar10",
          f"PAWS, {BESIDE_SWAV}, 1000 labels, 10 epochs", f"SwAV, {BESIDE_SWAV}, 10 epochs", "knn_last", "linear",
          flaw="unequal views, labels and probes"),
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


def load_swav(run: Path) -> nn.Module:
    return load_backbone(BESIDE_SWAV, run / "checkpoint.pth.tar")


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
        return supervised(here, labels, flags, labels // 10, 1, seed, repeat, BATCH)

    def swav(epochs: int, seed: int) -> dict:
        flags = f"{SWAV} {images} --epochs {epochs}"
        variant = Variant(f"SwAV, {BESIDE_SWAV}, {epochs} epochs", flags, "main_swav.py")
        return run("swav", variant, seed, here / "swav" / str(epochs) / str(seed))

    # the longest first
    jobs = [partial(paws, CIFAR10_NETWORK, labels, CIFAR10_EPOCHS, s) for labels in CIFAR10_LABELS for s in seeds]
    jobs += [
        partial(paws, BESIDE_SWAV, LABELS_BESIDE_SWAV, epochs, s) for epochs in (CIFAR10_EPOCHS, half) for s in seeds
    ]
    jobs += [partial(swav, epochs, s) for epochs in (CIFAR10_EPOCHS, half) for s in seeds]
    jobs += [partial(alone, labels, s) for labels in CIFAR10_LABELS for s in seeds]
    results, data = in_parallel(lambda job: job(), jobs, parallel), (str(train), str(test))
    others = [result for result in results if "SwAV" in result["variant"]]
    results = [result for result in results if "SwAV" not in result["variant"]]
    results += with_linear(others, CARD, load_swav, data, 32, parallel)
    results += [pixels(data, n, n // 10, seed, "cifar10") for n in CIFAR10_LABELS for seed in seeds]
    columns = {"knn_last": "soft nearest neighbours, k-NN", "linear": "linear", "top1": "labels alone, or 1-NN"}
    write(out, "paws_cifar10", results, table(results, columns))


if __name__ == "__main__":
    main(__doc__, "paws", claims, cifar10)
