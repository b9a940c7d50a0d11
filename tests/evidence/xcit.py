"""The small experiments behind xcit/README.md: CIFAR-10 beside a ViT and a ResNet of equal cost, distillation, DINO.

    python tests/evidence/xcit.py --cifar10 DIR                       # DIR holds train/ and test/ with class folders
    python tests/evidence/xcit.py --cifar10 DIR --only XCiT --epochs 1 --seeds 0

Trained is on 1,600 images of every class, as in the evidence of dino/; without --cifar10 on the embedded digits. Every
run uses one thread; --parallel of them run at a time. All networks see the same 64-pixel images, augmentation and
optimiser for as many epochs, and have about as many multiply-adds per image (printed first). Numbers are those of the
last epoch, mean and standard deviation over the seeds. The teacher of the distillation is the ResNet of the same seed,
which has to be trained before.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.evidence import dino
from tests.evidence.runs import SEEDS, Variant, run_all, table, write
from xcit.networks import build_network

SIDE_PX = 64
NETWORKS = {"XCiT": "xcit_tiny_12_p16", "ViT": "deit_tiny_patch16_224", "ResNet": "resnet10t"}
DISTILLED, SELF_SUPERVISED = "XCiT distilled from the ResNet", "DINO with XCiT and with a ViT"
COMMON = (
    f"--input-size {SIDE_PX} --batch-size 64 --warmup-epochs 1 --lr 0.004 --drop-path 0 --no-repeated-aug "
    "--no-model-ema --mixup 0.2 --cutmix 1 --reprob 0 --full_crop --num_workers 0 --log_freq 50 --pictures off "
    "--device cpu"
)
COLUMNS = {"acc_last": "top-1", "loss": "training loss"}


def multiply_adds(model: str) -> float:
    """Of a forward pass of one image, in millions."""
    with torch.device("meta"), torch.no_grad():
        network = build_network(model, 10, img_size=SIDE_PX).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, SIDE_PX, SIDE_PX))
    return counter.get_total_flops() / 2e6


def run(variant: Variant, seed: int, out: Path) -> dict:
    """Train one variant with one thread; the last lines of its log and the wall time."""
    folder = out / variant.name.replace(" ", "_") / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    flags = variant.flags.replace("SEED", str(seed)).split()
    command = [sys.executable, "main.py", *flags, "--seed", str(seed), "--output_dir", str(folder)]
    start = time.perf_counter()
    with open(folder.with_suffix(".log"), "w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT / "xcit", env=environment, stdout=file, stderr=file, check=True)
    minutes = (time.perf_counter() - start) / 60
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    accuracy = [line["test_acc1"] for line in lines if "test_acc1" in line][-1]
    last = [line for line in lines if "loss" in line][-1]
    return {"variant": variant.name, "seed": seed, "minutes": round(minutes, 2), **last, "acc_last": accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build/evidence/xcit")
    parser.add_argument("--cifar10", help="folder with train/ and test/; the embedded digits without it")
    parser.add_argument("--epochs", type=int, default=10, help="of the supervised runs")
    parts = (*NETWORKS, DISTILLED, SELF_SUPERVISED)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), metavar="PART", help=", ".join(parts))
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    args = parser.parse_args()
    out = args.out.absolute()
    data, common = "", f"{COMMON} --epochs {args.epochs}"
    if args.cifar10:
        folder = Path(args.cifar10).absolute()
        train = dino.few_per_class(folder / "train", out / "train")
        data = f" --data_path {train} --val_path {folder / 'test'}"
    for name, model in NETWORKS.items():
        print(f"{name}: {model}, {multiply_adds(model):.0f} million multiply-adds at {SIDE_PX} px", flush=True)
    flags = {name: f"--model {model} {common}{data}" for name, model in NETWORKS.items()}
    variants = [Variant(name, flags[name]) for name in NETWORKS if name in args.only]
    results = run_variants(variants, args.seeds, out, args.parallel)
    if DISTILLED in args.only:
        teacher = f"--teacher-model {NETWORKS['ResNet']} --teacher-path {out / 'ResNet' / 'SEED' / 'checkpoint.pth'}"
        distilled = Variant(DISTILLED, f"{flags['XCiT']} --distillation-type hard {teacher}")
        results += run_variants([distilled], args.seeds, out, args.parallel)
    if results:
        write(out, "xcit", results, table(results, COLUMNS))
    if SELF_SUPERVISED in args.only:
        recipe = (dino.CIFAR10 if args.cifar10 else dino.DIGITS) + data
        rows = [Variant("XCiT-N12/8", f"{recipe} --arch xcit_nano_12_p8"), Variant("ViT-tiny/8", recipe)]
        results = run_all("dino", rows, out / "dino", args.parallel, tuple(args.seeds))
        columns = {"knn_before": "k-NN before", "knn_last": "k-NN after", "feature_spread": "feature spread"}
        write(out, "xcit_dino", results, table(results, columns))


def run_variants(variants: list[Variant], seeds: list[int], out: Path, parallel: int) -> list[dict]:
    jobs = [(variant, seed) for variant in variants for seed in seeds]
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(lambda job: run(*job, out), jobs))


if __name__ == "__main__":
    main()
