"""The small experiments of seer/RESULTS.md: uncurated beside curated images, three widths, robustness by group.

    UNCURATED_DATA=/path/to/data python -m tests.evidence.seer --cifar10 /path/to/cifar10       # 100 core-minutes

SEER on 16,000 uncurated images (a long tail, several sources, frames of a video, duplicates) and on 16,000 of CIFAR-10,
1,600 a class; then each network is fine-tuned on 1 % and 10 % of the labels of the latter, beside the same one from
random weights. Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch;
verdicts follow from the differences of each seed.
"""

import csv
import json
from pathlib import Path

from tests.evidence.claims import CONFIRMED, Claim
from tests.evidence.runs import Variant, in_parallel, last_values, machine, main, once, run, run_script, table
from tests.evidence.runs import write as write_results
from tests.evidence.uncurated import uncurated

SIDE, IMAGES, TESTED = 32, 16000, 300  # pixels; images of a run; test images of a class
RUN = (
    "--num_workers 0 --pictures off --log_freq 50 --eval_knn_freq 0 --nmb_crops 2 4 --size_crops 32 16 "
    "--min_scale_crops 0.3 0.1 --max_scale_crops 1 0.3 --blur_radius 0.1 0.5 --hidden_mlp 512 --feat_dim 64 "
    "--nmb_prototypes 100 --batch_size 64 --passes 5 --base_lr 4 --head_bn true --freeze_prototypes_niters 125"
)
UNCURATED, CURATED, MIDDLE, NARROW, SUPERVISED = "uncurated", "curated", "middle", "narrow", "supervised"
ARCHS = {UNCURATED: "regnet_mini", CURATED: "regnet_mini", MIDDLE: "regnet_micro", NARROW: "regnet_pico"}
VARIANTS = [Variant(name, f"{RUN} --arch {arch}", "main_seer.py") for name, arch in ARCHS.items()]
TUNING = f"--num_workers 0 --image_size {SIDE} --num_labels 10 --colours false --val_freq 1000 --crop_scale 0.4 1"
EPOCHS = {1: "--epochs 60 --decay_epochs 40", 10: "--epochs 20 --decay_epochs 14"}
RATES = {1: "--lr 0.1 --batch_size 10", 10: "--lr 0.1 --batch_size 32"}
RESULTS = "seer_uncurated"
# fmt: off
CLAIMS = [
    Claim("uncurated images give features as good as curated ones", "10 % of CIFAR-10's labels, within two "
          "points", RESULTS, UNCURATED, CURATED, "acc1_10", within=2),
    Claim("the same with very few labels", "1 % of the labels", RESULTS, UNCURATED, CURATED, "acc1_1", within=2),
    Claim("few labels go further than without pre-training", "10 % of the labels", RESULTS, UNCURATED, SUPERVISED,
          "acc1_10"),
    Claim("wider networks are better", "10 %, each beside the narrower one", RESULTS,
          (UNCURATED, MIDDLE), (MIDDLE, NARROW), "acc1_10"),
    Claim("less is lost under corruption than by a supervised network", "accuracy left", RESULTS, UNCURATED,
          SUPERVISED, "acc1_left"),
    Claim("the worst group is better off than with a supervised network", "generated groups, top-1 of neighbours",
          RESULTS, UNCURATED, SUPERVISED, "acc1_worst"),
    Claim("sharded networks train as whole ones", "2 processes beside 1", numbers="`tests/seer/test_main_seer.py`",
          found=CONFIRMED),
    Claim("a billion images in one pass: 84.2 fine-tuned, 77.9 with 10 % of the labels (2021)"),
    Claim("the 10 B network is better than supervised ones on 70 % of 50 benchmarks (2022)"),
    Claim("larger networks are fairer (2022): there are no data about people here, and none were looked for"),
]
# fmt: on


def labelled(out: Path, train: Path, test: Path) -> Path:
    """A folder with ``train``, these images of CIFAR-10, and ``val/``, ``TESTED`` test images of each class."""
    for images in sorted(test.iterdir()):
        place = out / "labelled/val" / images.name
        place.mkdir(parents=True, exist_ok=True)
        for image in sorted(images.iterdir())[:TESTED]:
            if not (place / image.name).exists():
                (place / image.name).symlink_to(image.resolve())
    if not (out / "labelled/train").exists():
        (out / "labelled/train").symlink_to(train)
    return out / "labelled"


def tuned(weights: str, arch: str, percent: int, seed: int, probe: Path, folder: Path) -> float:
    """Top-1 after fine-tuning with so many labels."""
    command = ["fine_tune.py", "--pretrained", weights, *TUNING.split(), *EPOCHS[percent].split()]
    command += [*RATES[percent].split(), "--labels_perc", str(percent), "--data_path", str(probe)]
    command += ["--seed", str(seed), "--output_dir", str(folder), *(["--arch", arch] if weights == "random" else [])]

    def work() -> dict:
        run_script("seer", command, folder.with_suffix(".log"))
        return {"acc1": json.loads((folder / "log.txt").read_text().splitlines()[-1])["test_acc1"]}

    return once(folder.with_suffix(".json"), command, work)["acc1"]


def robust(folder: Path, probe: Path) -> dict[str, float]:
    """Of a network that was fine-tuned with 10 % of the labels: what is left under corruption, and the worst group."""
    common = ["--data_path", str(probe), "--image_size", str(SIDE), "--num_workers", "0"]
    first = ["eval_robustness.py", "--pretrained", str(folder), "--severities", "3", *common]
    first += ["--output_dir", f"{folder}_robust"]
    second = ["eval_groups.py", str(folder), "--folder", "seer", "--arch", ARCHS[UNCURATED], *common]
    second += ["--output_dir", f"{folder}_groups"]

    def work() -> dict:
        for command in (first, second):
            run_script("seer", command, folder.with_name(f"{folder.name}_{command[0]}.log"))
        found = json.loads(Path(f"{folder}_robust/robustness.json").read_text())
        with open(f"{folder}_groups/groups.csv", newline="") as file:
            worst = min(float(row["top1"]) for row in csv.DictReader(file) if row["column"] == "generated")
        return {"acc1_left": 100 * found["corrupted"] / found["clean"], "acc1_worst": worst}

    return once(folder.with_name(f"{folder.name}_robust.json"), first + second, work)


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train_images: Path, test_images: Path) -> None:
    probe = labelled(out, train_images, test_images)
    data = dict.fromkeys(ARCHS, uncurated(out / "uncurated", SIDE, 0, IMAGES)) | {CURATED: probe / "train"}

    def train(job: tuple[Variant | None, int]) -> dict:
        variant, seed = job
        name = SUPERVISED if variant is None else variant.name
        folder = out / "runs" / name / str(seed)
        if variant is None:
            command = f"python fine_tune.py --pretrained random --arch {ARCHS[UNCURATED]}"
            result = {"variant": name, "seed": seed, "minutes": 0.0, "command": command, "machine": machine()}
        else:
            variant = Variant(name, f"{variant.flags} --data_path {data[name]}", variant.script)
            result = run("seer", variant, seed, folder, lambda path: {"loss": last_values(path)["loss"]})
            del result["run"]
        weights = "random" if variant is None else str(folder)
        for percent in EPOCHS:
            place = folder.with_name(f"{seed}_tuned_{percent}")
            result[f"acc1_{percent}"] = tuned(weights, ARCHS[UNCURATED], percent, seed, probe, place)
        return result | (robust(place, probe) if name in (UNCURATED, SUPERVISED) else {})

    results = in_parallel(train, [(variant, seed) for variant in (*VARIANTS, None) for seed in seeds], parallel)
    columns = {"acc1_1": "1 % of the labels", "acc1_10": "10 %"}
    columns |= {"acc1_left": "left under corruption (%)", "acc1_worst": "worst group"}
    write_results(out, RESULTS, results, table(results, columns))


if __name__ == "__main__":
    main(__doc__, "seer", lambda *_: None, cifar10)
