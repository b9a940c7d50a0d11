"""Running variants of a training script over several seeds, and the table that comes of it."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Variant:
    """One row of a table: a name and the flags that make it."""

    name: str
    flags: str


def run(method: str, variant: Variant, seed: int, output_dir: Path) -> dict:
    """Train one variant with one thread; the log's last lines and the wall time."""
    command = ["main.py", *variant.flags.split(), "--seed", str(seed), "--output_dir", str(output_dir)]
    log = output_dir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(log, "w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, *command], cwd=ROOT / method, env=environment, stdout=file, stderr=file, check=True
        )
    minutes = (time.perf_counter() - start) / 60
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line[key] for line in lines for key in ("knn_top1", "snn_top1") if key in line]
    last = [line for line in lines if "loss" in line][-1]
    return {"variant": variant.name, "seed": seed, "minutes": round(minutes, 2), "knn_before": accuracies[0],
            "knn_last": accuracies[-1], "command": " ".join(["python", *command[:-2]]), **last}  # fmt: skip


def run_all(
    method: str, variants: list[Variant], out: Path, parallel: int, seeds: tuple[int, ...] = SEEDS
) -> list[dict]:
    """Every variant with every seed, ``parallel`` runs at a time, one thread each."""
    jobs = [(variant, seed) for variant in variants for seed in seeds]
    with ThreadPoolExecutor(parallel) as pool:
        results = pool.map(lambda job: run(method, *job, out / job[0].name.replace(" ", "_") / str(job[1])), jobs)
        return list(results)


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
        cells = [spread([r[key] for r in mine], 1 if key.startswith("knn") else 3) for key in columns]
        rows.append(f"| {name} | {' | '.join(cells)} | {statistics.mean(r['minutes'] for r in mine):.1f} |")
    return "\n".join(rows)


def machine() -> dict:
    """What the numbers were measured on."""
    return {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}


def write(out: Path, name: str, results: list[dict], text: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    (out / f"{name}.md").write_text(text + "\n")
    print(text, flush=True)
