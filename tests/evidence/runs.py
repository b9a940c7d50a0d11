"""Running variants of a training script over several seeds, what they are compared with, and the table of it."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shared.optimisation.precision import Precision
from shared.pictures import report_page
from shared.run.log import read_log
from tests.evidence.claims import decimals

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)
TUNING_SEED = 7
DISTILLED = "distilled from the ResNet"
IMAGES_PER_CLASS = 1600


@dataclass(frozen=True)
class Variant:
    """One row of a table: a name, the flags that make it, and the training script."""

    name: str
    flags: str
    script: str = "main.py"


def with_images(variants: Iterable[Variant], images: tuple[str | None, str | None]) -> list[Variant]:
    """The variants on images to train (None: the embedded ones) and to evaluate on."""
    data = f"--data_path {images[0]} --val_path {images[1]}" if images[0] else f"--val_path {images[1]}"
    return [replace(variant, flags=f"{variant.flags} {data}") for variant in variants]


def run_script(method: str, command: list[str], log: Path) -> None:
    """Run a script of the method's folder with one thread; what it prints goes to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        subprocess.run(
            [sys.executable, *command], cwd=ROOT / method, env=environment, stdout=file, stderr=file, check=True
        )


def once(path: Path, command: list[str], work: Callable[[], dict]) -> dict:
    """What ``work`` returns; it is kept in ``path``, so that interrupted experiments do not repeat what has ended.

    Args:
        path: JSON file.
        command: What ``work`` runs; with another one the file does not count.
    """
    if path.exists() and (kept := json.loads(path.read_text()))["command"] == command:
        return kept["result"]
    result = work()
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps({"command": command, "result": result}) + "\n")
    partial.rename(path)
    return result


def features(output_dir: Path) -> dict:
    """Last numbers of a run that learns features, and their k-NN accuracy before and after."""
    lines = read_log(output_dir / "metrics.jsonl")
    accuracies = [line[key] for line in lines for key in ("knn_top1", "snn_top1") if key in line]
    last = [line for line in lines if "loss" in line][-1]
    return {"knn_before": accuracies[0], "knn_last": accuracies[-1], **last}


def last_values(output_dir: Path) -> dict:
    """The last value of everything that a run has logged."""
    last: dict = {}
    for line in read_log(output_dir / "metrics.jsonl"):
        last |= line
    return last


def classifier(output_dir: Path) -> dict:
    """Last accuracy and losses of a supervised run."""
    last = last_values(output_dir)
    return {"acc1": last["test_acc1"], "test_loss": last["test_loss"], "loss": last["loss"]}


def run(method: str, variant: Variant, seed: int, output_dir: Path, read: Callable[[Path], dict] = features) -> dict:
    """Train one variant with one thread; its folder, what ``read`` finds there and the wall time."""
    command = [variant.script, *variant.flags.split(), "--seed", str(seed), "--output_dir", str(output_dir)]

    def train() -> dict:
        start = time.perf_counter()
        run_script(method, command, output_dir.with_suffix(".log"))
        minutes = round((time.perf_counter() - start) / 60, 2)
        result = {"variant": variant.name, "seed": seed, "minutes": minutes, **read(output_dir)}
        amp = command[command.index("--amp") + 1] if "--amp" in command else "auto"
        return result | {"command": " ".join(["python", *command[:-2]]), "machine": machine(amp)}

    return once(output_dir.with_suffix(".json"), command, train) | {"run": output_dir}


def run_all(
    method: str,
    variants: list[Variant],
    out: Path,
    parallel: int,
    seeds: tuple[int, ...] = SEEDS,
    read: Callable[[Path], dict] = features,
) -> list[dict]:
    """Every variant with every seed, ``parallel`` runs at a time, one thread each."""
    jobs = [(variant, seed) for variant in variants for seed in seeds]

    def train(job: tuple[Variant, int]) -> dict:
        return run(method, *job, out / job[0].name.replace(" ", "_") / str(job[1]), read)

    return in_parallel(train, jobs, parallel)


def beside_others(
    method: str,
    variants: list[Variant],
    build: Callable[[list[str]], tuple[nn.Module, int]],
    teacher: str,
    out: Path,
    parallel: int,
    seeds: tuple[int, ...],
) -> None:
    """Classifiers of about equal cost, which is printed; the first is also distilled from the last of the same seed.

    Writes the results, which are named by the method and the folder ``out``.

    Args:
        build: Maps flags to the network and the side of its images in pixels.
        teacher: ``--teacher-model`` of the last variant.
    """
    for variant in variants:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            network, side = build(variant.flags.split())
            network.eval()(torch.empty(1, 3, side, side))
        print(f"{variant.name}: {counter.get_total_flops() / 2e6:.0f} million multiply-adds", flush=True)
    results = run_all(method, variants, out, parallel, seeds, classifier)
    teachers = {result["seed"]: result["run"] / "checkpoint.pth" for result in results[-len(seeds) :]}

    def distill(seed: int) -> dict:
        distilled = f"--distillation-type hard --teacher-model {teacher} --teacher-path {teachers[seed]}"
        variant = Variant(f"{variants[0].name}, {DISTILLED}", f"{variants[0].flags} {distilled}")
        return run(method, variant, seed, out / "distilled" / str(seed), classifier)

    results += in_parallel(distill, seeds, parallel)
    columns = {"acc1": "top-1", "test_loss": "test loss", "loss": "training loss"}
    write(out.parent, f"{method}_{out.name}", results, table(results, columns))


def tuned(
    method: str,
    variant: Variant,
    rates: Iterable[float],
    folder: Path,
    parallel: int,
    metric: str,
    measure: Callable[[list[dict]], list[dict]] = list,
    read: Callable[[Path], dict] = features,
) -> tuple[Variant, list[dict]]:
    """The variant with the rate (``--lr``) that is best with a seed of its own, and the results of all rates.

    Args:
        measure: Maps results of :func:`run_all` to results that hold ``metric``, if they do not yet.
    """
    variants = [
        Variant(f"{variant.name}, rate {rate}", f"{variant.flags} --lr {rate}", variant.script) for rate in rates
    ]
    results = measure(run_all(method, variants, folder, parallel, (TUNING_SEED,), read))
    best = max(range(len(variants)), key=lambda i: results[i][metric])
    return replace(variants[best], name=variant.name), results


def beside_vit(
    method: str, variants: list[Variant], rates: Iterable[float], out: Path, parallel: int, seeds: tuple[int, ...]
) -> None:
    """Classifiers with a warm-up, each with the best of three rates; writes the results as ``<method>_tuned``."""
    results = []
    for variant in variants:
        warm = replace(variant, flags=f"{variant.flags} --warmup-epochs 1")
        best, found = tuned(method, warm, rates, out / "tuned", parallel, "acc1", read=classifier)
        results += run_all(method, [best], out / "tuned", parallel, seeds, classifier) + found
    columns = {"acc1": "top-1", "test_loss": "test loss", "loss": "training loss"}
    write(out, f"{method}_tuned", results, table(results, columns))


def in_parallel(function: Callable, jobs: Iterable, parallel: int) -> list:
    """``function`` of every job, in order, ``parallel`` of them at a time."""
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(function, jobs))


def further_materials(out: Path, number: int = 2400) -> Path:
    """Folder of generated images that nothing else uses, to evaluate on: the 360 embedded ones are few.

    It is below ``out``, so that no stored command names a folder of the machine.
    """
    if not (out / "further/val").exists():
        write_them = ["-m", "shared.images.materials", str(out / "drawn"), "--train", "12", "--val", str(number)]
        run_script("", [*write_them, "--seed", "100"], out / "drawn.log")
        (out / "drawn").rename(out / "further")
    return out / "further/val"


def cifar10_images(folder: Path, out: Path, per_class: int | Sequence[int] = IMAGES_PER_CLASS) -> tuple[Path, Path]:
    """The first training images of every class and the test images.

    Both are links below ``out``, so that no stored command names a folder of the machine.

    Args:
        folder: Has train/ and test/ with a folder per class.
        per_class: Training images of every class, or of each.
    """
    train, test = out / "cifar10/train", out / "cifar10/test"
    classes = sorted((folder / "train").iterdir())
    numbers = [per_class] * len(classes) if isinstance(per_class, int) else per_class
    for images, number in zip(classes, numbers, strict=True):
        (train / images.name).mkdir(parents=True, exist_ok=True)
        for image in sorted(images.iterdir())[:number]:
            link = train / images.name / image.name
            if not link.exists():
                link.symlink_to(image)
    if not test.exists():
        test.symlink_to(folder / "test")
    return train, test


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation over seeds, as text."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table(results: list[dict], columns: dict[str, str]) -> str:
    """Markdown: one row per variant, mean and spread over seeds of each column (key -> heading), median minutes."""
    rows = [f"| variant | {' | '.join(columns.values())} | minutes a run |", "|---" * (len(columns) + 2) + "|"]
    for name in dict.fromkeys(r["variant"] for r in results):
        found = {key: [r[key] for r in results if r["variant"] == name and key in r] for key in (*columns, "minutes")}
        minutes = found.pop("minutes")
        cells = [spread(values, decimals(key)) if values else "" for key, values in found.items()]
        rows.append(f"| {name} | {' | '.join(cells)} | {f'{statistics.median(minutes):.1f}' if minutes else ''} |")
    return "\n".join(rows)


def machine(amp: str = "auto") -> dict:
    """What numbers are measured on: machine, precision, versions."""
    precision = Precision(amp, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    versions = {name: version(name) for name in ("torch", "torchvision", "timm", "numpy")}
    found = {"machine": report_page.machine(), "precision": str(precision.dtype or torch.float32).split(".")[1]}
    return found | versions | {"python": platform.python_version()}


def write(out: Path, name: str, results: list[dict], text: str) -> None:
    """Save every row as ``name.json`` and the table as ``name.md``, and print the table.

    Paths below ``out`` are stored relative to it; a row without a machine was measured on this one.
    """
    results = [{"machine": machine("fp32")} | {k: v for k, v in result.items() if k != "run"} for result in results]
    out.mkdir(parents=True, exist_ok=True)
    report = json.dumps({"results": results}, indent=1)
    (out / f"{name}.json").write_text(report.replace(f"{out}/", "") + "\n")
    (out / f"{name}.md").write_text(text + "\n")
    print(text, flush=True)


def main(
    docstring: str,
    method: str,
    claims: Callable[[Path, int, tuple[int, ...]], None],
    cifar10: Callable[[Path, int, tuple[int, ...], Path, Path], None],
) -> None:
    """The command line of a method's experiments.

    Args:
        docstring: Of the script; its first paragraph is the description.
        claims: Called with the output folder, the number of runs at a time and the seeds.
        cifar10: Called with the same, the folder of training images and that of test images.
    """
    parser = argparse.ArgumentParser(description=docstring.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build/evidence" / method)
    parser.add_argument("--only", choices=("claims", "cifar10"), help="one of the two")
    parser.add_argument("--cifar10", type=Path, help="folder with train/ and test/; without it only the claims")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    if args.only == "cifar10" and args.cifar10 is None:
        parser.error("--only cifar10: give the folder of the images as --cifar10")
    out, seeds = args.out.absolute(), tuple(args.seeds)
    torch.set_num_threads(1)  # of what is measured in this process
    if args.only != "cifar10":
        claims(out, args.parallel, seeds)
    if args.only != "claims" and args.cifar10:
        cifar10(out, args.parallel, seeds, *cifar10_images(args.cifar10.absolute(), out))
