"""The small experiments behind xcit/README.md: CIFAR-10 beside a ViT and a ResNet of equal cost, distillation, DINO.

    python tests/evidence/xcit.py --cifar10 FOLDER                    # supervised and distilled, three seeds
    python tests/evidence/xcit.py --cifar10 FOLDER --only "XCiT" --epochs 2 --seeds 0

FOLDER is where torchvision keeps CIFAR-10; without it the embedded digits are used. Every run uses one thread;
--parallel of them run at a time. All networks get the same images, augmentation, optimiser and number of epochs; their
widths are chosen for equal multiply-adds per image (printed first). Numbers are those of the last epoch, mean and
standard deviation over the seeds. The teacher of the distillation is the ResNet of the same seed, trained before.
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

from tests.evidence.runs import SEEDS, Variant, table, write
from xcit.networks import build_network

# 32-pixel images: XCiT-N12/8 has a grid of 4 x 4 tokens; the others have about as many multiply-adds
NETWORKS = {"XCiT": "xcit_nano_12_p8", "ViT": "deit_tiny_patch16_224", "ResNet": "resnet10t"}
SIDES = {"XCiT": 32, "ViT": 48, "ResNet": 48}  # the ViT with patches of 16 gets as many tokens from larger images
COMMON = (
    "--batch-size 64 --warmup-epochs 1 --lr 0.004 --drop-path 0 --no-repeated-aug --no-model-ema --mixup 0.2 --cutmix 1 "
    "--reprob 0 --full_crop --num_workers 0 --log_freq 50 --pictures off --device cpu"
)
COLUMNS = {"acc_last": "top-1", "loss": "training loss"}


def multiply_adds(model: str, side: int) -> float:
    """Of a forward pass of one image, in millions."""
    with torch.device("meta"), torch.no_grad():
        network = build_network(model, 10, img_size=side).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, side, side))
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
    parser.add_argument("--cifar10", help="folder of torchvision's CIFAR-10; the embedded digits without it")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--only", nargs="+", choices=(*NETWORKS, "XCiT distilled"), default=[*NETWORKS, "XCiT distilled"]
    )
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    out = args.out.absolute()
    common = f"{COMMON} --epochs {args.epochs} --aa rand-m9-mstd0.5-inc1"
    if args.cifar10:
        common += f" --data-set CIFAR10 --data-path {Path(args.cifar10).absolute()}"
    costs = {name: multiply_adds(model, SIDES[name]) for name, model in NETWORKS.items()}
    for name, cost in costs.items():
        print(f"{name}: {NETWORKS[name]} at {SIDES[name]} px, {cost:.0f} million multiply-adds", flush=True)
    variants = [
        Variant(name, f"--model {model} --input-size {SIDES[name]} {common}")
        for name, model in NETWORKS.items()
        if name in args.only
    ]
    results = run_variants(variants, args.seeds, out, args.parallel)
    if "XCiT distilled" in args.only:
        teacher = out / "ResNet" / "SEED" / "checkpoint.pth"
        flags = f"--model {NETWORKS['XCiT']} --input-size {SIDES['XCiT']} {common} --distillation-type hard"
        flags += f" --teacher-model {NETWORKS['ResNet']} --teacher-path {teacher}"
        results += run_variants([Variant("XCiT distilled", flags)], args.seeds, out, args.parallel)
    write(out, "xcit", results, table(results, COLUMNS))


def run_variants(variants: list[Variant], seeds: list[int], out: Path, parallel: int) -> list[dict]:
    jobs = [(variant, seed) for variant in variants for seed in seeds]
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(lambda job: run(*job, out), jobs))


if __name__ == "__main__":
    main()
