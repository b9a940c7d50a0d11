"""Images per second of multi-crop augmentation (2 x 224 + 8 x 96 pixels) on one core, from JPEG files.

    python tests/benchmarks/bench_multicrop.py --images FOLDER [--out FILE.json]
    python tests/benchmarks/bench_multicrop.py --loader            # through the loader, with 0, 1 and 2 workers

Augmentation chains, alternated on the same files in one process with one thread:

- ``plain``: torchvision's transforms on PIL images, one per crop, as a data set class would apply them;
- ``pil``, ``fast``: our two backends; ``fast+norm`` also normalises on the CPU, which training leaves to the device;
- ``lightly``: the DINO transform of that package, where it is installed.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np
import PIL
import simplejpeg
import torch
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms

import shared.images.views
from dino.augmentations import MEAN, STD, dino_views
from shared.images.loading import EpochBatchSampler, make_loader
from shared.images.sources import open_source
from shared.images.views import HUE
from shared.multicrop import MultiCropDataset, normalize_views

GLOBAL_SCALE, LOCAL_SCALE, LOCAL_CROPS = (0.4, 1.0), (0.05, 0.4), 8
BATCH = 10


class PlainBlur:
    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        if random.random() > self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class PlainSolarize:
    def __call__(self, image):
        return ImageOps.solarize(image) if random.random() < 0.2 else image


class PlainChain:
    """The views as a textbook data set makes them: one torchvision chain per crop, normalised floats out."""

    def __init__(self):
        colors = [
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
        ]
        finish = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]

        def crop(size, scale):
            mode = transforms.InterpolationMode.BICUBIC
            return transforms.RandomResizedCrop(size, scale=scale, interpolation=mode)

        large, small = crop(224, GLOBAL_SCALE), crop(96, LOCAL_SCALE)
        self.chains = [
            transforms.Compose([large, *colors, PlainBlur(1.0), *finish]),
            transforms.Compose([large, *colors, PlainBlur(0.1), PlainSolarize(), *finish]),
            *[transforms.Compose([small, *colors, PlainBlur(0.5), *finish])] * LOCAL_CROPS,
        ]

    def __call__(self, path):
        with open(path, "rb") as file:
            image = Image.open(file).convert("RGB")
        return [chain(image) for chain in self.chains]


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


def write_photographs(folder: Path, count: int) -> None:
    """JPEG files of 500 x 375 pixels with the spectrum of photographs (amplitude falling as 1/f)."""
    rng = np.random.default_rng(0)
    rows, columns = np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None]
    amplitude = 1 / np.maximum(np.hypot(rows, columns), 1 / 500)
    for i in range(count):
        phases = rng.uniform(0, 2 * np.pi, (3, *amplitude.shape))
        planes = np.fft.irfft2(amplitude * np.exp(1j * phases), s=(375, 500))
        planes = planes + 1.5 * planes.mean(axis=0)  # colours are correlated
        pixels = 128 + 50 * (planes - planes.mean()) / planes.std()
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        image.save(folder / f"{i:03}.jpg", quality=90)


def time_chains(source, rounds: int, images_per_round: int) -> dict[str, list[float]]:
    """Milliseconds per image of every chain, one value per round."""
    recipes = dino_views(GLOBAL_SCALE, LOCAL_SCALE, LOCAL_CROPS)
    datasets = {backend: MultiCropDataset(source, recipes, backend=backend) for backend in ("pil", "fast")}
    plain, lightly = PlainChain(), lightly_chain()

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
    for chain in chains.values():
        chain(range(BATCH))  # warm up
    times = {name: [] for name in chains}
    indices = [i * len(source) // images_per_round for i in range(images_per_round)]  # every round does the same
    for _ in range(rounds):
        for name, chain in chains.items():
            start = time.perf_counter()
            chain(indices)
            times[name].append((time.perf_counter() - start) / images_per_round * 1e3)
    return times


def time_stages(source, repeats: int) -> dict[str, float]:
    """Milliseconds per image of the fast chain's stages on the draws of one epoch: the best of the repeats."""
    recipes = dino_views(GLOBAL_SCALE, LOCAL_SCALE, LOCAL_CROPS)
    dataset = MultiCropDataset(source, recipes)
    rounds = []
    for _ in range(repeats):
        totals = dict.fromkeys(("read", "decode", "draw", "resize", "jitter", "hue", "grey", "blur", "write"), 0.0)

        def timed(stage, function, *arguments, totals=totals, **keywords):
            start = time.perf_counter()
            result = function(*arguments, **keywords)
            totals[stage] += time.perf_counter() - start
            return result

        for i in range(len(source)):
            image = timed("read", source.load, i)
            pixels = timed("decode", image.decode)
            views = timed("draw", dataset.draw, image.height, image.width, (0, 0, i))
            for view, recipe in zip(views, recipes, strict=True):
                crop = timed("resize", shared.images.views._resized_crop, pixels, view, recipe, (1.0, 1.0))
                for step, factor in view.jitter:
                    stage = "hue" if step == HUE else "jitter"
                    crop = timed(stage, shared.images.views._FAST_JITTER[step], crop, factor)
                out = np.empty((recipe.size_px, recipe.size_px, 3), dtype=np.uint8)
                rest = view._replace(jitter=(), grey=False, blur_radius=0.0)
                if view.grey:
                    crop = timed("grey", cv2.cvtColor, crop, cv2.COLOR_RGB2GRAY)
                if view.blur_radius > 0:
                    crop = timed("blur", shared.images.views._blur, crop, view.blur_radius)
                timed("write", shared.images.views._finish, crop, rest, recipe, out)
        rounds.append({stage: total / len(source) * 1e3 for stage, total in totals.items()})
    return {stage: min(r[stage] for r in rounds) for stage in rounds[0]}


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
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", help="folder of JPEG files (default: 40 generated ones)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images_per_round", type=int, default=40)
    parser.add_argument("--loader", action="store_true", help="measure the loader instead of one core")
    parser.add_argument("--out", help="JSON file for the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)

    with tempfile.TemporaryDirectory() as folder:
        if not args.images:
            write_photographs(Path(folder), 40)
        source = open_source(args.images or folder, "all", flag="--images")
        print(source.describe() if args.images else "40 generated JPEG files, 500 x 375 pixels")
        result = {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "versions": {
                module.__name__: module.__version__ for module in (torch, torchvision, PIL, cv2, simplejpeg, np)
            },
        }
        if args.loader:
            result["loader_images_per_s"] = {}
            for num_workers in (0, 1, 2):
                rate = time_loader(source, num_workers, batch_size=20, epochs=3)
                result["loader_images_per_s"][num_workers] = rate
                print(f"{num_workers} workers: {rate:.0f} images/s")
        else:
            times = time_chains(source, args.rounds, args.images_per_round)
            result["ms_per_image"], result["speedup_over_plain"] = times, {}
            print(f"{args.rounds} rounds of {args.images_per_round} images; speed-up over plain: median (range), best")
            print(f"{'chain':10} {'images/s':>9} {'ms/image':>9} {'best ms':>8}  speed-up")
            for name, values in times.items():
                ratios = [a / b for a, b in zip(times["plain"], values, strict=True)]
                ratio = statistics.median(ratios)
                result["speedup_over_plain"][name] = {"median": ratio, "min": min(ratios), "max": max(ratios)}
                ms = statistics.median(values)
                best = min(times["plain"]) / min(values)
                result["speedup_over_plain"][name]["of_best"] = best
                spread = f"{ratio:.2f} ({min(ratios):.2f} .. {max(ratios):.2f}), {best:.2f}"
                print(f"{name:10} {1e3 / ms:9.0f} {ms:9.2f} {min(values):8.2f}  {spread}")
            met = result["target_met"] = result["speedup_over_plain"]["fast"]["median"] >= 4
            print(f"target: fast 4 times as fast as plain: {'met' if met else 'not met'}")
            result["stages_ms"] = time_stages(source, repeats=5)
            print("fast, ms per image:", "  ".join(f"{k} {v:.2f}" for k, v in result["stages_ms"].items()))
    print("versions:", ", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
