"""DINO on several processes beside one at an equal total batch and as many threads in all; time to the first step.

    python tests/benchmarks/bench_scaling.py [--processes 2] [--out FILE.json]

Whole commands, alternated: the images/s are those of the run's log after its first steps, the time to the first step is
that from the command to the line before it.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import shared.run.passive_threads  # noqa: F401
from shared.run.log import read_log
from tests.benchmarks.harness import compare, finish, get_args_parser

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--arch vit_small --global_crop_size 96 --local_crop_size 48 --local_crops_number 4 --out_dim 4096 --epochs 1 "
    "--eval_knn_freq 0 --pictures off --num_workers 0 --log_freq 1"
)
READY = "steps in all"  # in the last line before the first step


def run(processes: int, batch: int, images: Path, output_dir: Path, threads: int) -> tuple[float, list[float]]:
    """Seconds to the first step, and those of every step."""
    launcher = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run"]
    launcher += [] if processes == 1 else ["--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, "main_dino.py", *FLAGS.split(), "--data_path", str(images), "--output_dir", str(output_dir)]
    command += ["--batch_size_per_gpu", str(batch // processes)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads // processes), "PYTHONUNBUFFERED": "1"}
    start, ready = time.perf_counter(), None
    with subprocess.Popen(
        command, cwd=ROOT / "dino", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if ready is None and READY in line:
                ready = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError("".join(lines))
    return ready, [batch / line["images_per_s"] for line in read_log(output_dir / "metrics.jsonl") if "loss" in line]


def main() -> None:
    parser = get_args_parser(__doc__, rounds=4)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="images of a step, of all processes together")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    names = {"1 process": 1, f"{args.processes} processes": args.processes}
    times, ready = {name: [] for name in names}, {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        size = ["--size", "96", "--train", str(args.batch * args.steps), "--val", "1"]
        subprocess.run(
            [sys.executable, "-m", "shared.images.materials", f"{folder}/images", *size], cwd=ROOT, check=True
        )
        for turn in range(args.rounds):
            for name, processes in names.items():
                output_dir = Path(folder) / name / str(turn)
                first, seconds = run(processes, args.batch, Path(folder) / "images/train", output_dir, args.threads)
                ready[name].append(first)
                times[name].append(statistics.median(seconds[2:]))
    rows = compare(times, "1 process")
    for name, seconds in ready.items():
        print(f"{name}: {statistics.median(seconds):.1f} s from the command to the first step")
    met = rows[f"{args.processes} processes"]["speedup"]["median"] >= 0.95
    targets = {"as fast as one process": met, "6 s to the first step": statistics.median(ready["1 process"]) <= 6}
    finish(args, {"steps": rows, "ready": ready}, targets)


if __name__ == "__main__":
    main()
