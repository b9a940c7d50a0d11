"""Every benchmark, one after the other; each writes a JSON file.

python tests/benchmarks/run_all.py --out build/bench [--images FOLDER_OF_JPEGS]
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OF_PHOTOGRAPHS = ("bench_multicrop", "bench_navit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--images", help="photographs for multi-crop and NaViT; without it generated ones")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for script in sorted(HERE.glob("bench_*.py")):
        print(f"\n== {script.stem}", flush=True)
        command = [sys.executable, str(script), "--out", str(args.out / f"{script.stem}.json")]
        command += ["--compile"] * (script.stem == "bench_step")
        if args.images and script.stem in OF_PHOTOGRAPHS:
            command += ["--images", args.images]
        if subprocess.run(command).returncode:
            failed.append(script.stem)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
