"""The small experiments of seer/RESULTS.md: uncurated beside curated images, three widths, robustness by group.

    UNCURATED_DATA=/path/to/data make evidence METHOD=seer              # about 35 core-minutes

SEER on 6,000 uncurated images (a long tail, several sources, frames of a video, duplicates) and on 6,000 of
Tiny-ImageNet, 30 a class; then each network is fine-tuned on 1 %, 10 % and all labels of 20 classes of Tiny-ImageNet,
beside the same one from random weights. Every run uses one thread; --parallel of them run at a time. Numbers are those
of the last epoch; verdicts follow from the differences of each seed.
"""

import csv
import json
from pathlib import Path

from tests.evidence.claims import CONFIRMED, Claim
from tests.evidence.runs import SEEDS, Variant, in_parallel, last_values, machine, main, once, run, run_script, table
from tests.evidence.runs import write as write_results

SIDE, PER_CLASS = 40, 30
RUN = (
    "--num_workers 0 --pictures off --amp fp32 --log_freq 50 --eval_knn_freq 0 --nmb_crops 2 2 --size_crops 32 16 "
    "--min_scale_crops 0.3 0.1 --max_scale_crops 1 0.3 --blur_radius 0.1 0.5 --hidden_mlp 256 --feat_dim 32 "
    "--nmb_prototypes 120 --batch_size 64 --passes 5 --base_lr 4 --freeze_prototypes_niters 60"
)
UNCURATED, CURATED, NARROW, WIDE, SUPERVISED = "uncurated", "curated", "narrow", "wide", "supervised"
VARIANTS = [
    Variant(UNCURATED, f"{RUN} --arch regnet_micro", "main_seer.py"),
    Variant(CURATED, f"{RUN} --arch regnet_micro", "main_seer.py"),
    Variant(NARROW, f"{RUN} --arch regnet_pico", "main_seer.py"),
    Variant(WIDE, f"{RUN} --arch regnet_mini", "main_seer.py"),
]
TUNING = "--num_workers 0 --image_size 32 --num_labels 20 --colours false --val_freq 1000 --crop_scale 0.4 1"
EPOCHS = {1: "--epochs 60 --decay_epochs 40", 10: "--epochs 30 --decay_epochs 20", 100: "--epochs 8 --decay_epochs 5 7"}
RATES = {1: "--lr 0.1 --batch_size 10", 10: "--lr 0.1 --batch_size 16", 100: "--lr 0.1 --batch_size 32"}
RESULTS = "seer_uncurated"
# fmt: off
CLAIMS = [
    Claim("uncurated images give features as good as curated ones", "6,000 images each, 10 % of the labels of 20 "
          "classes, within two points", RESULTS, UNCURATED, CURATED, "acc1_10", within=2),
    Claim("the same with very few labels", "1 % of the labels", RESULTS, UNCURATED, CURATED, "acc1_1", within=2),
    Claim("few labels go further than without pre-training", "10 % of the labels", RESULTS, UNCURATED, SUPERVISED,
          "acc1_10"),
    Claim("wider networks are better", "10 % of the labels, each beside the next narrower one", RESULTS,
          (WIDE, UNCURATED), (UNCURATED, NARROW), "acc1_10"),
    Claim("accuracy falls less under corruption than that of a supervised network of equal size", "eight corruptions, "
          "share of the accuracy that is left", RESULTS, UNCURATED, SUPERVISED, "acc1_left"),
    Claim("the worst group is better off than with a supervised network", "generated groups, top-1 of the worst one",
          RESULTS, UNCURATED, SUPERVISED, "acc1_worst"),
    Claim("sharded networks train as whole ones", "2 processes beside 1", numbers="`tests/seer/test_main_seer.py`",
          found=CONFIRMED),
    Claim("a billion images in one pass: 84.2 fine-tuned, 77.9 with 10 % of the labels (2021)"),
    Claim("the 10 B network is better than supervised ones on 70 % of 50 benchmarks (2022)"),
    Claim("larger networks are fairer (2022): there are no data about people here, and none were looked for"),
]
# fmt: on


def curated(folder: Path, side: int) -> Path:
    """30 images of every class of Tiny-ImageNet, about 6,000, in one folder without classes."""
    from tests.evidence import uncurated as images

    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        classes = images.by_class("tiny_imagenet/train.tar")
        wanted = {name for names in classes.values() for name in sorted(names)[:PER_CLASS]}
        for name, image in images.read("tiny_imagenet/train.tar", wanted):
            images.square(image, side).save(folder / f"{name.replace('/', '_').rsplit('.', 1)[0]}.png")
        (folder / "done").touch()
    return folder


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
    """Of a network that was fine-tuned with all labels: what is left under corruption, and the worst group."""
    common = ["--data_path", str(probe), "--image_size", "32", "--num_workers", "0"]
    first = ["eval_robustness.py", "--pretrained", str(folder), "--severities", "3", *common]
    first += ["--output_dir", f"{folder}_robust"]
    second = ["eval_groups.py", str(folder), "--folder", "seer", "--arch", "regnet_micro", *common]
    second += ["--output_dir", f"{folder}_groups"]

    def work() -> dict:
        for command in (first, second):
            run_script("seer", command, folder.with_name(f"{folder.name}_{command[0]}.log"))
        found = json.loads(Path(f"{folder}_robust/robustness.json").read_text())
        with open(f"{folder}_groups/groups.csv", newline="") as file:
            worst = min(float(row["top1"]) for row in csv.DictReader(file) if row["column"] == "generated")
        return {"acc1_left": 100 * found["corrupted"] / found["clean"], "acc1_worst": worst}

    return once(folder.with_name(f"{folder.name}_robust.json"), first + second, work)


def claims(out: Path, parallel: int, seeds: tuple[int, ...] = SEEDS) -> None:
    from tests.evidence import uncurated as images

    probe = images.probe_images(out / "probe", SIDE)
    data = {name: images.uncurated(out / "uncurated", SIDE, seed=0) for name in (UNCURATED, NARROW, WIDE)}
    data[CURATED] = curated(out / "curated", SIDE)

    def train(job: tuple[Variant | None, int]) -> dict:
        variant, seed = job
        name = SUPERVISED if variant is None else variant.name
        folder = out / "runs" / name / str(seed)
        if variant is None:
            result = {
                "variant": name,
                "seed": seed,
                "minutes": 0.0,
                "command": "python fine_tune.py --pretrained random",
            }
            result |= {"machine": machine("fp32")}
        else:
            variant = Variant(name, f"{variant.flags} --data_path {data[name]}", variant.script)
            result = run("seer", variant, seed, folder, lambda path: {"loss": last_values(path)["loss"]})
            del result["run"]
        weights = "random" if variant is None else str(folder)
        percents = (1, 10, 100) if name in (UNCURATED, SUPERVISED) else (1, 10)
        for percent in percents:
            place = folder.with_name(f"{seed}_tuned_{percent}")
            result[f"acc1_{percent}"] = tuned(weights, "regnet_micro", percent, seed, probe, place)
        return result | (robust(place, probe) if 100 in percents else {})

    results = in_parallel(train, [(variant, seed) for variant in (*VARIANTS, None) for seed in seeds], parallel)
    columns = {"acc1_1": "1 % of the labels", "acc1_10": "10 %", "acc1_100": "all"}
    columns |= {"acc1_left": "left under corruption (%)", "acc1_worst": "worst group"}
    write_results(out, RESULTS, results, table(results, columns))


if __name__ == "__main__":
    main(__doc__, "seer", claims, lambda *_: None)
