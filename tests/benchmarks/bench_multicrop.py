"""Images per second of multi-crop augmentation (2 x 224 + 8 x 96 pixels) on one core, from JPEG files.

    python tests/benchmarks/bench_multicrop.py --images FOLDER [--out FILE.json]
    python tests/benchmarks/bench_multicrop.py --loader            # through the loader, by workers

Augmentation chains, alternated on the same files in one process with one thread:

- ``plain``: torchvision's transforms on PIL images, one per crop, as a data set class would apply them;
- ``pil``, ``fast``: our two backends; ``fast+norm`` also normalises on the CPU, which training leaves to the device;
- ``lightly``: the DINO transform of that package, where it is installed.
"""

import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cv2
import numpy as np
import PIL
import simplejpeg
import torch
import torchvision
from PIL import Image
from torchvision import transforms

import shared.run.passive_threads  # noqa: F401
from dino.augmentations import MEAN, STD, dino_views
from shared.images.loading import EpochBatchSampler, make_loader
from shared.images.sources import open_source
from shared.multicrop import MultiCropDataset, normalize_views
from tests.benchmarks.harness import Times, alternate, compare, finish, get_args_parser
from tests.shared.images.torchvision_chain import torchvision_chain
from tests.shared.photographs import encoded, photograph

GLOBAL_SCALE, LOCAL_SCALE, LOCAL_CROPS = (0.4, 1.0), (0.05, 0.4), 8
BATCH = 10


def plain_chain():
    """The views as a textbook data set makes them: one torchvision chain per crop, normalised floats out."""
    finish = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    recipes = dino_views(GLOBAL_SCALE, LOCAL_SCALE, LOCAL_CROPS)
    chains = [transforms.Compose([torchvision_chain(recipe), *finish]) for recipe in recipes]

    def chain(path):
        with open(path, "rb") as file:
            image = Image.open(file).convert("RGB")
        return [chain(image) for chain in chains]

    return chain


def lightly_chain():
    """lightly's DINO transform on a path, or None where the package is missing."""
    try:
        from lightly.transforms import DINOTransform
    except ImportError:
        return None
    transform = DINOTransform(global_crop_scale=GLOBAL_SCALE, local_crop_scale=LOCAL_SCALE, n_local_views=LOCAL_CROPS)

    def chain(path):
        with open(path, "rb") as file:
            return transform(Image.open(file).convert("RGB"))

    return chain


def time_chains(source, rounds: int, images_per_round: int) -> Times:
    """Seconds of every chain on the images of a round."""
    recipes = dino_views(GLOBAL_SCALE, LOCAL_SCALE, LOCAL_CROPS)
    datasets = {backend: MultiCropDataset(source, recipes, backend=backend) for backend in ("pil", "fast")}
    plain, lightly = plain_chain(), lightly_chain()

    def batches(dataset, indices):
        for start in range(0, len(indices), BATCH):
            yield dataset.__getitems__([(0, i) for i in indices[start : start + BATCH]])[0]

    chains = {
        "plain": lambda indices: [plain(source.path(i)) and None for i in indices],
        "pil": lambda indices: [None for _ in batches(datasets["pil"], indices)],
        "fast": lambda indices: [None for _ in batches(datasets["fast"], indices)],
        "fast+norm": lambda indices: [
            normalize_views(views, "cpu", MEAN, STD) and None for views in batches(datasets["fast"], indices)
        ],
    }
    if lightly:
        chains["lightly"] = lambda indices: [lightly(source.path(i)) and None for i in indices]
    indices = [i * len(source) // images_per_round for i in range(images_per_round)]  # every round does the same
    return alternate({name: partial(chain, indices) for name, chain in chains.items()}, rounds)


def time_loader(source, num_workers: int, batch_size: int, epochs: int) -> float:
    """Images per second that come out of the loader once its workers run."""
    recipes = dino_views(GLOBAL_SCALE, LOCAL_SCALE, LOCAL_CROPS)
    sampler = EpochBatchSampler(len(source), batch_size)
    loader = make_loader(MultiCropDataset(source, recipes), batch_sampler=sampler, num_workers=num_workers)
    images, start = 0, 0.0
    for epoch in range(epochs + 1):
        if epoch == 1:  # epoch 0 starts the workers
            start = time.perf_counter()
        sampler.set_epoch(epoch)
        for views, _, indices in loader:
            images += len(indices) if epoch else 0
            del views
    return images / (time.perf_counter() - start)


def main() -> None:
    parser = get_args_parser(__doc__, rounds=7)
    parser.add_argument("--images", help="folder of JPEG files; none: 40 generated ones")
    parser.add_argument("--images_per_round", type=int, default=40)
    parser.add_argument("--loader", action="store_true", help="measure the loader instead of one core")
    parser.set_defaults(threads=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)

    result, targets = {}, {}
    workers = [number for number in (0, 1, 2, 4, 8, 15) if number <= max(2, os.cpu_count() - 1)] if args.loader else [1]
    generated = 40 * max(workers)
    with tempfile.TemporaryDirectory() as folder:
        if not args.images:
            for i in range(generated):
                path = Path(folder) / f"{i:03}.jpg"
                path.write_bytes(encoded(photograph(i, 375, 500), "JPEG", quality=90))
        source = open_source(args.images or folder, "all", flag="--images")
        print(source.describe() if args.images else f"{generated} generated JPEG files, 500 x 375 pixels")
        if args.loader:
            result["loader_images_per_s"] = rates = {}
            for number in workers:
                rates[number] = time_loader(source, number, batch_size=20, epochs=3 if number else 1)
                print(f"{number} workers: {rates[number]:.0f} images/s", flush=True)
        else:
            times = time_chains(source, args.rounds, args.images_per_round)
            rates = {name: args.images_per_round / statistics.median(seconds) for name, seconds in times.items()}
            notes = {name: f"{rate:.0f} images/s" for name, rate in rates.items()}
            result = {"images_per_s": rates, "chains": compare(times, "plain", notes)}
            targets["fast 4 times as fast as plain"] = result["chains"]["fast"]["speedup"]["median"] >= 4
    finish(args, result, targets, (torch, torchvision, PIL, cv2, simplejpeg, np))


if __name__ == "__main__":
    main()
