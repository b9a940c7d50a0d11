"""Everything there is to measure on one GPU, in one go of at most ten minutes; writes one JSON file.

    python tests/benchmarks/gpu.py --out build/gpu.json [--limit_s 570] [--images FOLDER_OF_JPEGS]

In this order, as far as the time reaches: steps of DINO, SwAV, MSN, XCiT and ResMLP at equal precision, compiled too,
with the share of the GPU's product rate, peak memory, launches and synchronisations; the rate of DINO's loader beside
that of the step; the GPU tests. What did not fit into the time is named in the file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEAST_S, MOST_S = 20, 120  # with less time left nothing is begun; no job takes more
STEP = "tests/benchmarks/bench_step.py --device cuda --compile --launches --rounds 5"
MSN = STEP.replace("bench_step", "bench_msn") + " --amp bf16"
SWAV = STEP.replace("bench_step", "bench_swav")
SUPERVISED = STEP.replace("bench_step", "bench_supervised")
JOBS = {
    "DINO ViT-S/16, 64 images": f"{STEP} --batch 64",
    "DINO ViT-B/16, 64 images": f"{STEP} --batch 64 --arch vit_base",
    "SwAV ResNet-50, 64 images": f"{SWAV} --batch 64",
    "MSN ViT-S/16": f"{MSN} --batch_size 64",
    "XCiT-S12/16, 128 images": f"{SUPERVISED} --batch 128",
    "ResMLP-S12, 128 images": f"{SUPERVISED} --batch 128 --network resmlp_12",
    "loader": "tests/benchmarks/bench_multicrop.py --loader",
    "GPU tests": "-m pytest tests/gpu -q",
    "DINO ViT-S/16, 256 images": f"{STEP} --batch 256 --no_float32",
    "DINO ViT-B/16, 256 images": f"{STEP} --batch 256 --arch vit_base --no_float32",
}


def run_jobs(jobs: dict[str, str], limit_s: float) -> dict[str, dict]:
    """What each job printed and wrote, in turn; one that takes ``MOST_S`` or ends after ``limit_s`` is stopped.

    Returns:
        By name: ``state`` (done, failed, stopped, no time left), ``seconds``, ``output`` and ``result`` of a benchmark.
    """
    deadline, results = time.monotonic() + limit_s, {}
    for name, command in jobs.items():
        left = deadline - time.monotonic()
        if left < LEAST_S:
            results[name] = {"state": "no time left"}
            continue
        print(f"\n== {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            arguments = [sys.executable, *command.split(), *(["--out", str(out)] if "bench_" in command else [])]
            start = time.monotonic()
            try:
                run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=min(left, MOST_S))
                state, output = ("failed" if run.returncode else "done"), run.stdout + run.stderr
            except subprocess.TimeoutExpired as error:
                state, output = "stopped", (error.stdout or b"").decode()
            print(output[-3000:], flush=True)
            results[name] = {"state": state, "seconds": time.monotonic() - start, "output": output}
            if out.exists():
                results[name]["result"] = json.loads(out.read_text())
    return results


def loader_beside_step(results: dict[str, dict]) -> str:
    """Whether the loader keeps up with our fastest step of ViT-S/16, in a sentence."""
    step, loader = (results.get(name, {}).get("result") for name in ("DINO ViT-S/16, 64 images", "loader"))
    if not step or not loader:
        return "loader beside the step: one of the two was not measured"
    rates = loader["loader_images_per_s"]
    workers, most = max(rates.items(), key=lambda item: item[1])
    needed = max(row["images_per_s"] for kind, row in step["steps"].items() if kind.startswith("ours"))
    keeps_up = "keeps up" if most >= needed else "does not keep up"
    return f"the loader {keeps_up}: {most:.0f} images/s with {workers} workers, the step takes {needed:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu.json"))
    parser.add_argument("--limit_s", type=float, default=570, help="seconds in all")
    parser.add_argument("--images", help="photographs for the loader; generated ones without it")
    args = parser.parse_args()
    jobs = dict(JOBS)
    if args.images:
        jobs["loader"] += f" --images {args.images}"
    results = run_jobs(jobs, args.limit_s)
    print(loader_beside_step(results))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    for name, result in results.items():
        print(f"{result['state']:13} {result.get('seconds', 0):5.0f} s  {name}")


if __name__ == "__main__":
    main()
