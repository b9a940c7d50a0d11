"""Running variants of a training script over several seeds, what they are compared with, and the table of it."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from shared.evaluation.features import extract_features
from shared.evaluation.knn import knn_classify
from shared.evaluation.linear import LinearClassifier, train_one_epoch
from shared.images.labelled import open_labelled
from shared.images.loading import EvalDataset, EvalTransform
from shared.run.log import read_log

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)
IMAGES_PER_CLASS = 1600


@dataclass(frozen=True)
class Variant:
    """One row of a table: a name, the flags that make it, and the training script."""

    name: str
    flags: str
    script: str = "main.py"


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
        return result | {"command": " ".join(["python", *command[:-2]]), "machine": machine()}

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
) -> list[dict]:
    """Classifiers of about equal cost, which is printed; the first is also distilled from the last of the same seed.

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
        variant = Variant(f"{variants[0].name}, distilled from the ResNet", f"{variants[0].flags} {distilled}")
        return run(method, variant, seed, out / "distilled" / str(seed), classifier)

    return results + in_parallel(distill, seeds, parallel)


def in_parallel(function: Callable, jobs: Iterable, parallel: int) -> list:
    """``function`` of every job, in order, ``parallel`` of them at a time."""
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(function, jobs))


def linear(method: str, flags: str, out: Path, log_name: str) -> float:
    """Top-1 of the method's linear classifier after its last epoch.

    Args:
        flags: Of ``eval_linear.py``, without the output folder.
        log_name: Of the JSON lines that it writes to its output folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    command = ["eval_linear.py", *flags.split(), "--output_dir", str(out)]

    def probe() -> dict:
        run_script(method, command, out.with_suffix(".log"))
        return {"test_acc1": json.loads((out / log_name).read_text().splitlines()[-1])["test_acc1"]}

    return once(out.with_suffix(".json"), command, probe)["test_acc1"]


def cifar10_images(folder: Path, out: Path) -> tuple[Path, Path]:
    """The first ``IMAGES_PER_CLASS`` training images of every class, and the test images.

    Both are links below ``out``, so that no stored command names a folder of the machine.

    Args:
        folder: Has train/ and test/ with a folder per class.
    """
    train, test = out / "cifar10/train", out / "cifar10/test"
    for images in sorted((folder / "train").iterdir()):
        (train / images.name).mkdir(parents=True, exist_ok=True)
        for image in sorted(images.iterdir())[:IMAGES_PER_CLASS]:
            link = train / images.name / image.name
            if not link.exists():
                link.symlink_to(image)
    if not test.exists():
        test.symlink_to(folder / "test")
    return train, test


class Pixels(nn.Module):
    """Raw pixels as features."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class PixelFeatures:
    """Pixels of the labelled images that a run evaluates on, in place of a network's features.

    Args:
        data_path, val_path: As for the training scripts; None means the embedded images.
        image_size: Side in pixels.
        mean, std: Of the method's images.
    """

    def __init__(self, data_path: str | None, val_path: str | None, image_size: int, mean: tuple, std: tuple):
        device = torch.device("cpu")
        transform = EvalTransform(round(image_size * 256 / 224), image_size, mean, std)
        train, val = (EvalDataset(source, transform) for source in open_labelled(data_path, val_path))
        self.train, self.train_labels = extract_features(Pixels(), train, device)
        self.val, self.val_labels = extract_features(Pixels(), val, device)

    def knn(self) -> float:
        """Top-1 of k-NN with 20 neighbours, in percent."""
        return knn_classify(self.train, self.train_labels, self.val, self.val_labels, k=20)[0]

    def linear(self, epochs: int = 10, lr: float = 0.001) -> float:
        """Top-1 of a linear classifier after its last epoch, in percent."""
        torch.manual_seed(0)
        classifier = LinearClassifier(self.train.shape[1], int(self.train_labels.max()) + 1)
        optimizer = torch.optim.SGD(classifier.parameters(), lr, momentum=0.9)
        for _ in range(epochs):
            batches = torch.randperm(len(self.train)).split(64)
            rows = ((self.train[batch], self.train_labels[batch]) for batch in batches)
            train_one_epoch(classifier, nn.Identity(), rows, optimizer)
        with torch.no_grad():
            hits = classifier(self.val).argmax(dim=1) == self.val_labels
        return 100 * hits.double().mean().item()


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation over seeds, as text."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(results: list[dict], columns: dict[str, str]) -> str:
    """Markdown: one row per variant, mean and spread over seeds of each column (key -> heading)."""
    names = list(dict.fromkeys(r["variant"] for r in results))
    rows = [f"| variant | {' | '.join(columns.values())} | minutes a run |", "|---" * (len(columns) + 2) + "|"]
    for name in names:
        mine = [r for r in results if r["variant"] == name]
        cells = [
            spread([r[key] for r in mine], 1 if key.startswith(("knn", "linear", "rank_me", "acc1", "bleu")) else 3)
            for key in columns
        ]
        rows.append(f"| {name} | {' | '.join(cells)} | {statistics.mean(r['minutes'] for r in mine):.1f} |")
    return "\n".join(rows)


def machine() -> dict:
    """What the numbers were measured on."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()} | gpu


def write(out: Path, name: str, results: list[dict], text: str) -> None:
    """Save every run as ``name.json`` and the table as ``name.md``, and print the table.

    Paths below ``out`` are stored relative to it; ``machine`` is that of the summary, a run has its own.
    """
    results = [{key: value for key, value in result.items() if key != "run"} for result in results]
    out.mkdir(parents=True, exist_ok=True)
    report = json.dumps({"machine": machine(), "results": results}, indent=1)
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
    if args.only != "cifar10":
        claims(out, args.parallel, seeds)
    if args.only != "claims" and args.cifar10:
        cifar10(out, args.parallel, seeds, *cifar10_images(args.cifar10.absolute(), out))
