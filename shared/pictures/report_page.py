"""The run as a page: ``report.html`` in its folder, one file that opens from disk and asks nothing of a network.

    python -m shared.pictures.report_page RUN      # at any time, also while it trains

Every run ends with it. What it shows is read from the folder: the log, the newest checkpoint and the flags in it,
``views.json`` (how views are made) and ``clusters.csv`` (where a method has clusters of its own). A method that trains
on other things than images gives tables as ``page_tables(folder, flags)`` in its ``report.py``.
"""

import argparse
import base64
import contextlib
import csv
import hashlib
import importlib
import importlib.util
import io
import json
import math
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from shared import distributed
from shared.evaluation.extract_features import load_frozen, load_hub
from shared.evaluation.knn import nearest_neighbours
from shared.evaluation.near_duplicates import THRESHOLDS, find_groups
from shared.evaluation.neighbours import MOST_IMAGES, Gallery
from shared.images.decode import ImageError
from shared.images.labelled import NotLabelled, open_labelled
from shared.images.loading import BadImages, EvalDataset, tell_unreadable
from shared.images.sources import ImageSource, open_source, reading
from shared.images.views import ViewParams, ViewRecipe
from shared.multicrop import MultiCropDataset
from shared.networks.weights import flags_of_training, run_file, safe_load
from shared.pictures.attention import class_attention
from shared.pictures.sheets import normalised_pixels, thumbnail, to_pixels
from shared.run.estimate import duration_text, size_text
from shared.run.files import atomic_file
from shared.run.flags import Parser, add_device_flag
from shared.run.log import read_log
from shared.run.settings import flag_text
from shared.run.summary import margin, start_of, verdict

ROOT = Path(__file__).resolve().parents[2]
QUERIES, NEIGHBOURS, POINTS = 36, 8, 240  # images with neighbours and patches, neighbours of each, dots of the map
ROWS, PER_ROW, VIEWED = 8, 12, 3  # clusters and groups of near-duplicates, images of each, images with views
VOTERS = 20  # nearest neighbours that name a class
LEAST_GRID = 4  # patches along a side; coarser maps show nothing
MOST_BYTES, PATCH_BYTES = 7_500_000, 1_500_000  # of the file, of the features of patches
SECONDS = 6  # for features that no evaluation has made: of images, of patches
MOST_SEARCHED = 10_000  # images, for neighbours, clusters and near-duplicates
PACKAGES = ("torch", "torchvision", "timm", "numpy")
LARGE_CHARTS = 4
DULL = r"lr|wd|weight_decay|skipped|data_wait|.*_per_s"  # numbers of the log that are set or timed
NATS = r".*(loss|entropy).*|kl"
LEAST_NATS, LEAST_PERCENT = 1, 10  # of an axis, which magnifies no noise: as in curves.png
# name and unit of what the log calls a measure; ``pixels_<measure>`` is that of raw pixels
MEASURES = {
    "knn_top1": ("k-NN accuracy", "%"),
    "snn_top1": ("Soft nearest neighbours", "%"),
    "test_acc1": ("Top-1 accuracy", "%"),
    "recall_at_1": ("Recall at 1", "%"),
    "recall_at_10": ("Recall at 10", "%"),
    "rankme": ("RankMe", ""),
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("run", help="folder of a run that has saved a checkpoint")
    add_device_flag(parser.add_argument)
    return parser


# --- The run ----------------------------------------------------------------------------------------------------------


def defaults_of(script: ModuleType) -> dict:
    """Flags of a training script with their defaults; none of another module."""
    actions = script.get_args_parser()._actions if hasattr(script, "get_args_parser") else ()
    return {action.dest: action.default for action in actions if action.dest != "help"}


def find_script(flags: Mapping) -> ModuleType:
    """The training script with these flags: one that is loaded, or else of all that can be."""
    names = [f"{file.parent.name}.{file.stem}" for file in sorted(ROOT.glob("*/main*.py"))]
    for candidates in ([name for name in ("__main__", *names) if name in sys.modules], names):
        scored = [(0.0, None)]
        for name in candidates:
            with contextlib.suppress(ImportError):  # of packages that only one method needs
                known = defaults_of(module := importlib.import_module(name)).keys()
                scored.append((len(known & flags.keys()) / len(known | flags.keys()), module))
        likeness, best = max(scored, key=itemgetter(0))
        if likeness >= 0.9:
            break
    return best


def progress(folder: Path, lines: Sequence[dict], flags: Mapping) -> str:
    """How far a run is, and how long that took since it was started last."""
    steps = max((line["step"] for line in lines), default=0)
    epochs = len(read_log(folder / "log.txt"))
    done = f"{epochs} of {flags['epochs']} epochs" if "epochs" in flags else f"of {flags.get('total_steps', '?')}"
    done += ", not finished" if epochs < flags.get("epochs", 0) else ""
    seconds = (folder / "metrics.jsonl").stat().st_mtime - (folder / "attempt.json").stat().st_mtime
    return f"{steps:,} steps, {done}" + (f", {duration_text(seconds)}" if seconds > 1 else "")


def measures(
    lines: Sequence[dict], num_images: int, num_classes: int, lr_flag: str, start: str = "random weights"
) -> list[dict]:
    """What was measured before and after training from ``start``, with two standard errors where images are counted."""
    found = []
    recall_chance = first_value(lines, "recall_chance")
    for key, (name, unit) in MEASURES.items():
        measured = [line for line in lines if line.get(key) is not None]
        if not measured:
            continue
        first, last = measured[0], measured[-1]
        chance, images = 100 / num_classes if num_classes else None, num_images
        if first_among := re.fullmatch(r"recall_at_(\d+)", key):
            chance = min(100, int(first_among[1]) * recall_chance) if recall_chance else None
            images = round(100 / recall_chance) if recall_chance else 0
        values = {
            start: first[key] if first["step"] == 0 else None,
            "raw pixels": first_value(lines, f"pixels_{key}"),
            "trained": last[key] if last["step"] else None,
        }
        values = {label: value for label, value in values.items() if value is not None}
        before, sentence = values.get(start, chance), ""
        if unit and images and before is not None and "trained" in values:
            sentence = verdict(before, last, key, images, lr_flag, start, first.get("rankme"))
        measure = {"key": key, "name": name, "unit": unit, "verdict": sentence, "chance": chance if unit else None}
        measure["values"] = [(*item, margin(item[1], images) if unit and images else 0.0) for item in values.items()]
        found.append(measure | {"span": 100 if unit else 1.15 * max(values.values())})
    return found


def first_value(lines: Sequence[dict], key: str) -> float | None:
    return next((line[key] for line in lines if line.get(key) is not None), None)


def charts(lines: Sequence[dict], measured: Sequence[dict]) -> list[dict]:
    """Every number of the log that changes, over the steps: the loss and measures first, what is set or timed last."""
    of_measure, ln_k = {measure["key"]: measure for measure in measured}, first_value(lines, "ln_k")
    keys = [key for key in dict.fromkeys(key for line in lines for key in line) if key not in ("step", "epoch")]
    keys.sort(key=lambda key: (bool(re.fullmatch(DULL, key)), key != "loss", key not in of_measure))
    drawn = []
    for key in keys:
        points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
        if len({y for _, y in points}) < 2:
            continue
        measure = of_measure.get(key)
        chart = {"title": measure["name"] if measure else key, "large": len(drawn) < LARGE_CHARTS}
        chart["least"] = LEAST_NATS if re.fullmatch(NATS, key) else 0
        chart["points"] = points[: -1 : -(-len(points) // 400)] + points[-1:]
        if measure:
            chart |= {"unit": measure["unit"], "error": measure["values"][-1][2], "chance": measure["chance"]}
            chart["least"] = LEAST_PERCENT if measure["unit"] == "%" else 0
        elif key == "loss" or "entropy" in key:
            chart["ln K"] = ln_k
        drawn.append(chart)
    return drawn


# --- Images -----------------------------------------------------------------------------------------------------------


def encoded(pixels: np.ndarray, quality: int = 80) -> str:
    """An address that holds the picture itself; pixels that were repeated are stored once, and without loss."""
    for factor in (12, 8, 6, 4, 3, 2):
        once = pixels[::factor, ::factor]
        if np.array_equal(once.repeat(factor, 0).repeat(factor, 1)[: len(pixels), : pixels.shape[1]], pixels):
            pixels = once
            break
    Image.fromarray(pixels).save(file := io.BytesIO(), "WEBP", quality=quality, lossless=len(pixels) <= 48)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def thinned(gallery: Gallery, most: int) -> Gallery:
    """At most so many images of a gallery, drawn."""
    if len(gallery.rows) <= most:
        return gallery
    chosen = some(len(gallery.rows), most)
    return Gallery(gallery.source, [gallery.rows[i] for i in chosen], gallery.features[chosen])


class Pictures:
    """Thumbnails of the page, each one stored once and named by its number."""

    def __init__(self):
        self.numbers: dict[str, int] = {}
        self.pixels: list[np.ndarray] = []

    def add(self, gallery: Gallery, i: int) -> int:
        path = gallery.source.path(gallery.rows[i])
        if path not in self.numbers:
            self.numbers[path] = len(self.pixels)
            self.pixels.append(thumbnail(gallery.source, gallery.rows[i]))
        return self.numbers[path]


def some(length: int, most: int) -> list[int]:
    """Numbers below ``length``, drawn: every so many images could all be of a few classes."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(0))[:most].tolist()


def open_images(flags: Mapping) -> tuple[ImageSource, ImageSource]:
    """Images of the training, and others with labels where there are some, else the same."""
    args = argparse.Namespace(**flags)
    if "data_set" in flags:
        from shared.supervised.data import open_train_and_val

        return open_train_and_val(args)
    try:
        return open_labelled(args.data_path, args.val_path, **reading(args))
    except NotLabelled:
        source = open_source(args.data_path, "train", **reading(args))
        return source, source


@torch.no_grad()
def sample(network: nn.Module, source: ImageSource, transform, device, most: int, seconds: float) -> Gallery:
    """Drawn images of a source, as many as fit into the time, with their features; of this process alone."""
    rows, features, start = some(len(source), most), [], time.perf_counter()
    images = EvalDataset(source, transform, BadImages(len(source), max_fraction=1), rows)
    for first in range(0, len(rows), 32):
        batch = torch.stack([images[i][0] for i in range(first, min(first + 32, len(rows)))])
        features.append(network(batch.to(device)).float())
        if time.perf_counter() - start > seconds and first:
            break
    features = torch.cat(features)
    return Gallery(source, rows[: len(features)], features)


def view_sheets(folder: Path, source: ImageSource, flags: Mapping) -> list[dict]:
    """Some images with the boxes of their views, and these views."""
    if not (folder / "views.json").is_file():
        return []
    recipes = [
        ViewRecipe(**{name: tuple(value) if isinstance(value, list) else value for name, value in recipe.items()})
        for recipe in json.loads((folder / "views.json").read_text())
    ]
    dataset = MultiCropDataset(
        source, recipes, flags["seed"], flags.get("augmentation", "fast"), flags.get("in_chans", 3)
    )
    sheets = []
    for index in some(len(source), VIEWED):
        try:
            image = source.load(index)
            pixels = image.decode()
        except ImageError:
            continue
        views = [view for group in dataset[(0, index)][0] for view in group]
        draws = dataset.draw(image.height, image.width, (flags["seed"], 0, index))
        shrink = max(1, max(pixels.shape) // 360)
        boxes = [_box(*parts, image.height * image.width) for parts in zip(recipes, draws, views, strict=True)]
        whole = encoded(to_pixels(pixels[::shrink, ::shrink]))
        sheets.append({"width": image.width, "height": image.height, "source": whole, "boxes": boxes})
    return sheets


def _box(recipe: ViewRecipe, drawn: ViewParams, view: Tensor, area: int) -> dict:
    steps = {"flipped": drawn.flip, "colours changed": drawn.jitter, "grey": drawn.grey, "solarised": drawn.solarize}
    words = [f"{recipe.size_px} px", f"{drawn.height * drawn.width / area:.0%} of the image"]
    words += [step for step, applied in steps.items() if applied]
    words += [f"blur {drawn.blur_radius:.1f} px"] if drawn.blur_radius else []
    return {**drawn._asdict(), "px": recipe.size_px, "source": encoded(to_pixels(view)), "text": ", ".join(words)}


# --- Patches ----------------------------------------------------------------------------------------------------------


def as_grid(output: Tensor, batch: int) -> Tensor | None:
    """A map (B, D, h, w) or tokens (B, k + s * s, D), of which the first k are no patches, as (B, h, w, D)."""
    if not isinstance(output, Tensor) or len(output) != batch or output.dim() not in (3, 4):
        return None
    if output.dim() == 4:
        return output.permute(0, 2, 3, 1) if min(output.shape[2:]) >= LEAST_GRID else None
    extra = next((k for k in range(6) if math.isqrt(max(output.shape[1] - k, 0)) ** 2 == output.shape[1] - k), None)
    side = 0 if extra is None else math.isqrt(output.shape[1] - extra)
    return output[:, extra:].unflatten(1, (side, side)) if side >= LEAST_GRID else None


def _record(found: dict, name: str, module: nn.Module, inputs: tuple, output) -> None:
    batch = len(inputs[0]) if inputs and isinstance(inputs[0], Tensor) else 0
    if (grid := as_grid(output, batch)) is not None:
        found["last"] = name, grid


@torch.no_grad()
def patch_features(network: nn.Module, images: Tensor) -> tuple[str, Tensor] | None:
    """The last layer whose output has patches, and unit vectors (B, h, w, D) of as many images as the time allows.

    None where no layer has patches.
    """
    found, batches, start = {}, [], time.perf_counter()
    hooks = [module.register_forward_hook(partial(_record, found, name)) for name, module in network.named_modules()]
    try:
        for batch in images.split(4):
            if batches and time.perf_counter() - start > SECONDS:
                break
            network(batch)
            if "last" not in found:
                return None
            name, grid = found["last"]
            parent = network.get_submodule(name.rpartition(".blocks.")[0]) if re.search(r"blocks\.\d+$", name) else None
            norm = getattr(parent, "norm", None)  # a ViT's, which it applies to its class token only
            batches.append(F.normalize((norm(grid) if isinstance(norm, nn.Module) else grid).float(), dim=-1).cpu())
    finally:
        for hook in hooks:
            hook.remove()
    return name, torch.cat(batches)


def patches(network: nn.Module, gallery: Gallery, rows: Sequence[int], transform, device, mean, std) -> dict | None:
    """Images as the network sees them, features of their patches, and its last block's attention where it has one."""
    data = EvalDataset(gallery.source, transform, BadImages(len(gallery.source), max_fraction=1), rows)
    images = torch.stack([data[i][0] for i in range(len(rows))])
    if (found := patch_features(network, images.to(device))) is None:
        return None
    layer, grid = found
    images = images[: len(grid)]
    vectors = grid.flatten(0, -2)
    dims, exact = min(grid.shape[-1], max(16, PATCH_BYTES // (2 * len(vectors)))), grid.shape[-1]
    if dims < exact:  # cosines in the directions that hold most of the length
        vectors = F.normalize(vectors @ torch.linalg.eigh(vectors.T @ vectors)[1][:, -dims:], dim=-1)
    part = {
        "rows": grid.shape[1],
        "columns": grid.shape[2],
        "dims": dims,
        "note": f"layer {layer}, {exact} dimensions" + (f", the {dims} that hold most" if dims < exact else ""),
        "features": base64.b64encode(vectors.half().numpy().tobytes()).decode(),
        "images": [encoded(normalised_pixels(image, mean, std), 85) for image in images],
        "heads": 0,
    }
    vit = next((module for module in network.modules() if hasattr(module, "get_last_selfattention")), None)
    if vit is not None:
        maps = class_attention(vit, images.to(device)).float().cpu()
        if maps.shape[2:] == grid.shape[1:3]:
            maps = (255 * maps / maps.amax(dim=(2, 3), keepdim=True)).byte()
            part |= {"heads": maps.shape[1], "attention": base64.b64encode(maps.numpy().tobytes()).decode()}
    return part


# --- What features hold for alike -------------------------------------------------------------------------------------


def layouts(vectors: np.ndarray) -> dict[str, list]:
    """Places of features (N, D) on a plane, between 0 and 1: by principal components, and by neighbourhoods."""
    centred = vectors - vectors.mean(axis=0)
    places = {"PCA": centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T}
    if len(vectors) > 10:
        if importlib.util.find_spec("umap"):
            from umap import UMAP

            places["UMAP"] = UMAP(metric="cosine", random_state=0).fit_transform(vectors)
        else:
            from sklearn.manifold import TSNE

            near = min(30, (len(vectors) - 1) // 3)
            places["t-SNE"] = TSNE(perplexity=near, init="pca", random_state=0).fit_transform(vectors)
    scaled = {name: (xy - xy.min(axis=0)) / np.maximum(np.ptp(xy, axis=0), 1e-9) for name, xy in places.items()}
    return {name: xy.round(4).tolist() for name, xy in reversed(scaled.items())}


def cluster_numbers(folder: Path, database: Gallery, vectors: Tensor) -> tuple[np.ndarray, str]:
    """The cluster of every image: the method's own where it has some, else by k-means; and which ones these are."""
    if (file := folder / "clusters.csv").is_file():
        with open(file, encoding="utf-8", errors="surrogateescape", newline="") as opened:
            own = {line["image"]: int(line["cluster"]) for line in csv.DictReader(opened)}
        return np.array([own.get(database.source.path(row), -1) for row in database.rows]), "the method's own clusters"
    from sklearn.cluster import KMeans

    number = max(2, min(24, len(database.source.classes or ()) or len(vectors) // 20, len(vectors)))
    return KMeans(number, n_init=2, random_state=0).fit_predict(vectors.numpy()), f"k-means into {number}"


def alike(folder: Path, queries: Gallery, database: Gallery, pictures: Pictures) -> dict:
    """Neighbours, map, clusters, near-duplicates and confusions, by the cosine similarity of features."""
    found, known = (F.normalize(gallery.features.float().cpu(), dim=1) for gallery in (queries, database))
    itself = int(queries is database)
    cosines, near = nearest_neighbours(found, known, min(VOTERS + itself, len(known)))
    cosines, near = cosines[:, itself:], near[:, itself:].numpy()
    names, known_names = (
        np.array([gallery.class_name(i) for i in range(len(gallery.rows))]) for gallery in (queries, database)
    )
    labelled = queries.source.classes is not None
    is_same = known_names[near] == names[:, None]
    assigned, clusters_are = cluster_numbers(folder, database, known)

    dots = some(len(found), POINTS)
    colours = {"class": names[dots].tolist()} if labelled else {}
    colours["cluster"] = [f"cluster {assigned[i if itself else near[i, 0]]}" for i in dots]
    colours["neighbourhood"] = [round(float((is_same if labelled else cosines)[i].mean()), 3) for i in dots]
    shown = {
        "labelled": labelled,
        "queries": [
            {
                "image": pictures.add(queries, i),
                "name": names[i],
                "near": [
                    (pictures.add(database, j), round(cosine, 3), known_names[j])
                    for cosine, j in zip(cosines[i, :NEIGHBOURS].tolist(), near[i].tolist(), strict=False)
                ],
            }
            for i in dots[:QUERIES]
        ],
        "map": {
            "images": [pictures.add(queries, i) for i in dots],
            "names": [names[i] or Path(queries.source.path(queries.rows[i])).name for i in dots],
            "layouts": layouts(found[dots].numpy()),
            "colours": colours,
        },
        "clusters_are": clusters_are,
        "clusters": [],
    }
    for cluster, size in Counter(assigned[assigned >= 0].tolist()).most_common(ROWS):
        members = np.flatnonzero(assigned == cluster)
        from_middle = (known[members] @ known[members].mean(dim=0)).argsort(descending=True).numpy()
        chosen = members[from_middle[np.linspace(0, size - 1, min(PER_ROW, size)).astype(int)]]
        name, count = Counter(known_names[members].tolist()).most_common(1)[0]
        images = [(pictures.add(database, i), "" if known_names[i] == name else known_names[i]) for i in chosen]
        note = f"{count / size:.0%} {name}" if labelled else ""
        shown["clusters"].append({"title": f"{size} images", "note": note, "images": images})
    if labelled:
        votes = [Counter(row.tolist()).most_common(1)[0][0] for row in known_names[near]]
        wrong = Counter((name, vote) for name, vote in zip(names.tolist(), votes, strict=True) if name != vote)
        of_class = Counter(names.tolist())
        confused = [(*pair, f"{count} of {of_class[pair[0]]}") for pair, count in wrong.most_common(ROWS)]
        shown["confusions"] = confused
    return shown | near_duplicates(database, known, pictures)


def near_duplicates(gallery: Gallery, vectors: Tensor, pictures: Pictures) -> dict:
    """Groups at the least threshold that leaves nine images in ten alone; none where there is no such threshold."""
    groups = find_groups(vectors, [*(t for t in THRESHOLDS if t >= 0.95), 0.999, 0.9999])
    fitting = [t for t, found in groups.items() if 10 * sum(map(len, found)) <= len(vectors)]
    rows = []
    for group in groups[fitting[0]][:ROWS] if fitting else ():
        cosines = (vectors[group] @ vectors[group[0]]).tolist()
        images = [(pictures.add(gallery, i), f"{c:.3f}") for i, c in zip(group[:PER_ROW], cosines, strict=False)]
        paths = [gallery.source.path(gallery.rows[i]) for i in group]
        rows.append({"title": f"{len(group)} images", "note": "", "images": images, "paths": paths})
    return {
        "threshold": fitting[0] if fitting else None,
        "searched": len(vectors),
        "num_groups": len(groups[fitting[0]]) if fitting else 0,
        "duplicates": rows,
    }


# --- The page ---------------------------------------------------------------------------------------------------------


def machine() -> str:
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else []
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([*(gpus or names[:1] or [platform.machine()]), f"{len(os.sched_getaffinity(0))} cores"])


def image_parts(
    checkpoint: Path, method: str, flags: Mapping, galleries: tuple[Gallery, Gallery] | None, device
) -> tuple[dict, Pictures]:
    """What the page shows of images, which the flags lead to, and of the network of a checkpoint."""
    hub, pictures = load_hub(method), Pictures()
    train, val = open_images(flags)
    asked = dict.fromkeys(("arch", "image_size", "checkpoint_key", "patch_size"))
    network, transform = load_frozen(argparse.Namespace(folder=method, weights=str(checkpoint), **asked))
    network.to(device)
    if galleries is None:
        database = sample(network, train, transform, device, MOST_IMAGES, SECONDS)
        queries = database if val is train else sample(network, val, transform, device, POINTS, SECONDS / 2)
        galleries = queries, database
    database = thinned(galleries[1], MOST_SEARCHED)
    queries = database if galleries[0] is galleries[1] else thinned(galleries[0], MOST_IMAGES)
    rows = [queries.rows[i] for i in some(len(queries.rows), QUERIES)]
    return {
        "num_images": len(val),
        "num_classes": len(val.classes or ()),
        "source": train.describe(),
        "views": view_sheets(checkpoint.parent, train, flags),
        "alike": alike(checkpoint.parent, queries, database, pictures),
        "patches": patches(network, queries, rows, transform, device, hub.CARD.mean, hub.CARD.std),
    }, pictures


def write_page(
    checkpoint: Path,
    flags: Mapping,
    galleries: tuple[Gallery, Gallery] | None = None,
    problems: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> Path:
    """Write ``report.html`` beside the newest checkpoint of a run; rank 0 alone may call this.

    Args:
        flags: Of the run.
        galleries: Queries and what to search, where an evaluation has made their features.
        problems: Sentences about the health of the run.
    """
    import jinja2  # comes with torch

    folder, script = checkpoint.parent, find_script(flags)
    method, defaults = Path(script.__file__).parent.name, defaults_of(script)
    lines = read_log(folder / "metrics.jsonl")
    page = {"num_images": 0, "num_classes": 0, "alike": None, "patches": None}
    pictures = Pictures()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what is told of weights and images was told by the run
            if hasattr(report := importlib.import_module(f"{method}.report"), "page_tables"):
                page["tables"] = report.page_tables(folder, flags)
            else:
                parts, pictures = image_parts(checkpoint, method, flags, galleries, device)
                page |= parts
    except (OSError, ValueError) as error:  # such as data that are no longer where they were
        page["missing"] = str(error)
    lr_flag = "--base_lr" if "base_lr" in flags else "--lr"
    measured = measures(lines, page["num_images"], page["num_classes"], lr_flag, start_of(flags))
    losses = [line for line in lines if line.get("loss") is not None]
    known = sorted(flags.keys() & defaults.keys())
    shown, usual = ({name: flag_text(values[name]) for name in known} for values in (flags, defaults))
    page |= {
        "title": (ROOT / method / "README.md").read_text().splitlines()[0].strip("# "),
        "folder": str(folder.resolve()),
        "progress": progress(folder, lines, flags),
        "facts": {
            "checkpoints": ", ".join(
                f"{f.name} ({size_text(f.stat().st_size)})" for f in sorted(folder.glob("*.pth*"))
            ),
            "page written": f"{time.strftime('%Y-%m-%d %H:%M')} on {machine()}",
            "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES)
            + f", python {platform.python_version()}",
        },
        "measures": measured,
        "losses": losses[:1] + losses[1:][-1:],
        "problems": [*problems, *tell_unreadable(folder)],
        "changed": [(f"--{name}", shown[name], usual[name]) for name in known if shown[name] != usual[name]],
        "flags": [(f"--{name}", shown[name]) for name in known],
    }
    payload = {"charts": charts(lines, measured), "alike": page["alike"], "patches": page["patches"]}
    how = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = how.from_string(Path(__file__).with_suffix(".html").read_text())
    for quality in (80, 50, 20):
        payload["images"] = [encoded(pixels, quality) for pixels in pictures.pixels]
        page["payload"] = json.dumps(payload).replace("<", "\\u003c")
        html = template.render(page)
        if len(html) <= MOST_BYTES:
            break
    for kind in ("script", "style"):
        text = re.search(f"<{kind}>(.*?)</{kind}>", html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        html = html.replace(f"{kind}-hash", f"'sha256-{digest}'", 1)
    with atomic_file(folder / "report.html") as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))  # names may be no UTF-8
    return folder / "report.html"


def main() -> None:
    with distributed.clean_exit():
        args = get_args_parser().parse_args()
        if not Path(args.run).is_dir():
            raise ValueError(f"{args.run} is not the folder of a run")
        checkpoint = run_file(args.run)
        flags = flags_of_training(safe_load(checkpoint))
        print(write_page(checkpoint, flags, device=distributed.init("env://", args.device)))


if __name__ == "__main__":
    main()
