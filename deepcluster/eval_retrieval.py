"""Retrieval of buildings on Oxford5k and Paris6k with R-MAC descriptors (Caron et al. 2018, section 4.5).

    python eval_retrieval.py --stage extract_train --dataset /path/to/Oxford --dataset_name Oxford --model vgg16.pth.tar
    python eval_retrieval.py --stage train_pca     --dataset /path/to/Oxford --dataset_name Oxford --model vgg16.pth.tar
    python eval_retrieval.py --stage q_features    --dataset /path/to/Paris  --dataset_name Paris  --model vgg16.pth.tar
    python eval_retrieval.py --stage db_features   --dataset /path/to/Paris  --dataset_name Paris  --model vgg16.pth.tar
    python eval_retrieval.py --stage eval          --dataset /path/to/Paris  --dataset_name Paris  # VGG16: 72.0 mAP

The stages keep their results in ``--temp_dir``. A data set is a folder with the images and the published ground truth
(``*_query.txt``, ``*_good.txt``, ``*_ok.txt``, ``*_junk.txt``) anywhere below it. The whitening is learned on the other
data set. The lists are part of the protocol: an unreadable image is an error, or with ``--on_bad_image skip`` left out
(one of the database counts as junk), which the result says.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, to_tensor
from tqdm import tqdm

from deepcluster.convnets import ClusterNetwork
from deepcluster.hub import MEAN, STD, load_network
from deepcluster.rmac import Whitening, region_vectors, rmac
from shared import distributed
from shared.evaluation.ranking import average_precision
from shared.images.decode import EXTENSIONS, ImageError, read_image
from shared.images.loading import BadImages
from shared.run.flags import Parser, add_bad_image_flags, add_device_flag

STAGES = ("extract_train", "train_pca", "db_features", "q_features", "eval")
OTHER = {"Oxford": "Paris", "Paris": "Oxford"}
MOST_TRAIN_IMAGES = 10_000
BROKEN_PARIS_IMAGES = {
    f"paris_{name}"
    for name in (
        "louvre_000136 louvre_000146 moulinrouge_000422 museedorsay_001059 notredame_000188 pantheon_000284 "
        "pantheon_000960 pantheon_000974 pompidou_000195 pompidou_000196 pompidou_000201 pompidou_000467 "
        "pompidou_000640 sacrecoeur_000299 sacrecoeur_000330 sacrecoeur_000353 triomphe_000662 triomphe_000833 "
        "triomphe_000863 triomphe_000867"
    ).split()
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--S", type=int, default=1024, help="longer side of the images in pixels")
    add("--L", type=int, default=3, help="levels of R-MAC")
    add("--n_pca", type=int, default=512, help="dimensions of a descriptor")
    add("--model", default="pretrained", help="checkpoint; pretrained: torchvision's supervised vgg16_bn")
    add("--dataset", required=True, help="folder with the images and the ground truth")
    add("--dataset_name", default="Oxford", choices=tuple(OTHER))
    add("--stage", default="extract_train", choices=STAGES)
    add("--eval_binary", default="", help="accepted for published commands; average precision is computed here")
    add("--temp_dir", default="", help="folder for the results of the stages")
    for flag in ("multires", "aqe", "dbe"):
        options = {"action": "store_true"} if flag == "multires" else {"type": int, "default": None}
        add(f"--{flag}", help="an error: the official code takes it and does nothing", **options)
    add_bad_image_flags(add, "error", "skip")
    add_device_flag(add)
    return parser


def eval_retrieval(args: argparse.Namespace) -> float | None:
    """Run one stage; the last one returns the mean average precision in percent."""
    for flag in ("multires", "aqe", "dbe"):
        if getattr(args, flag):
            raise ValueError(f"--{flag} does nothing in the official code and is not available here")
    benchmark = read_benchmark(Path(args.dataset), args.dataset_name)
    folder = Path(args.temp_dir)
    files = {kind: folder / f"{args.dataset_name}_S{args.S}_L{args.L}_{kind}" for kind in ("regions", "db", "q")}
    if args.stage == "train_pca":
        arrays = read_arrays(files["regions"], "extract_train")
        vectors = torch.cat([torch.from_numpy(array) for array in arrays if array.size])
        whitening = Whitening.fit(vectors, args.n_pca)
        np.savez(pca_file(folder, args.dataset_name, args.S), mean=whitening.mean, matrix=whitening.matrix)
        print(f"whitening of {len(vectors)} region vectors: {pca_file(folder, args.dataset_name, args.S)}")
        return None
    if args.stage == "eval":
        (database, unread_images), (queries, unread_queries) = (
            stack(read_arrays(files[kind], stage)) for kind, stage in (("db", "db_features"), ("q", "q_features"))
        )
        benchmark = leave_out(benchmark, unread_images, unread_queries)
        precisions = [value for value in score(queries @ database.T, benchmark) if value is not None]
        mean = 100 * float(np.mean(precisions))
        gone = f", without {len(unread_images)} images and {len(benchmark.queries) - len(precisions)} queries"
        note = gone if unread_images or unread_queries else ""
        print(f"mAP on {args.dataset_name}: {mean:.2f} % ({len(precisions)} queries{note})")
        return mean

    device = distributed.init(device=args.device)
    model = MapsWithoutLastPooling(load_model(args.model)).to(device)
    policy = (args.on_bad_image, args.max_bad_fraction)
    if args.stage == "extract_train":
        images = [(path, None) for path in benchmark.images[:MOST_TRAIN_IMAGES]]
        regions = lambda path, box: vectors_of(model, path, box, args, device).cpu()  # noqa: E731
        write_arrays(files["regions"], images, regions, *policy)
        return None
    whitening = read_whitening(pca_file(folder, OTHER[args.dataset_name], args.S))
    if args.stage == "db_features":
        kind, images = "db", [(path, None) for path in benchmark.images]
    else:
        kind, images = "q", [(query.image, query.box) for query in benchmark.queries]
    descriptor = lambda path, box: rmac(vectors_of(model, path, box, args, device).cpu(), whitening)  # noqa: E731
    write_arrays(files[kind], images, descriptor, *policy)
    return None


# --- The benchmark ----------------------------------------------------------------------------------------------------


@dataclass
class Query:
    """A building: part of an image, ``box`` = (left, top, right, bottom) in pixels, and the indices of its images."""

    image: Path
    box: tuple[float, float, float, float]
    positives: set[int]
    junk: set[int]


@dataclass
class Benchmark:
    images: list[Path]
    queries: list[Query]


def read_benchmark(folder: Path, name: str) -> Benchmark:
    """Images and ground truth below a folder, both in alphabetical order.

    Raises:
        ValueError: If there are no images or queries, or the ground truth names an image that does not exist.
    """
    images = sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.stem not in BROKEN_PARIS_IMAGES
    )
    texts = sorted(folder.rglob("*_query.txt"))
    if not images or not texts:
        raise ValueError(f"--dataset {folder}: {len(images)} images and {len(texts)} files *_query.txt below it")
    index_of = {path.stem: i for i, path in enumerate(images)}

    def find(stem: str, file: Path) -> int:
        if stem not in index_of:
            raise ValueError(f"{file} names {stem}, which is not among the images below {folder}")
        return index_of[stem]

    queries = []
    for file in texts:
        words = file.read_text().split()
        if len(words) != 5:
            raise ValueError(f"{file}: expected a name and four numbers, found {len(words)} words")
        lists = {}
        for kind in ("good", "ok", "junk"):
            listed = file.with_name(file.name.replace("_query.txt", f"_{kind}.txt"))
            if not listed.is_file():
                raise ValueError(f"{listed} is missing beside {file.name}")
            names = [stem for stem in listed.read_text().split() if stem not in BROKEN_PARIS_IMAGES]
            lists[kind] = {find(stem, listed) for stem in names}
        image = images[find(words[0].removeprefix("oxc1_"), file)]
        box = tuple(float(word) for word in words[1:])
        queries.append(Query(image, box, lists["good"] | lists["ok"], lists["junk"]))
    return Benchmark(images, queries)


def leave_out(benchmark: Benchmark, images: set[int], queries: set[int]) -> Benchmark:
    """These images are junk for every query, and these queries have no positives."""
    left = [
        replace(query, positives=set() if i in queries else query.positives - images, junk=query.junk | images)
        for i, query in enumerate(benchmark.queries)
    ]
    return Benchmark(benchmark.images, left)


def score(similarities: np.ndarray, benchmark: Benchmark) -> list[float | None]:
    """Average precision of each query, in [0, 1]: good and ok images count, junk is taken out of the ranking.

    Queries without any have none.

    Args:
        similarities: (queries, images).
    """
    precisions = []
    for row, query in zip(similarities, benchmark.queries, strict=True):
        ranking = [i for i in np.argsort(-row, kind="stable") if i not in query.junk]
        places = np.flatnonzero([i in query.positives for i in ranking])
        precisions.append(average_precision(places, len(query.positives)) if query.positives else None)
    return precisions


# --- Descriptors ------------------------------------------------------------------------------------------------------


class MapsWithoutLastPooling(nn.Module):
    """The convolutional part of a network, normalised images (B, 3, H, W) to maps of twice the resolution."""

    def __init__(self, network: ClusterNetwork):
        super().__init__()
        if not isinstance(network.features, nn.Sequential) or not isinstance(network.features[-1], nn.MaxPool2d):
            raise ValueError("--model: retrieval needs alexnet or vgg16, whose maps end with a pooling")
        self.sobel = nn.Identity() if network.sobel is None else network.sobel
        self.features = network.features[:-1]

    def forward(self, images: Tensor) -> Tensor:
        return self.features(self.sobel(images))


def load_model(model: str) -> ClusterNetwork:
    if model != "pretrained":
        return load_network(model, keep_top_layer=False).requires_grad_(False)
    supervised = torchvision.models.vgg16_bn(weights=torchvision.models.VGG16_BN_Weights.IMAGENET1K_V1)
    network = ClusterNetwork(supervised.features, nn.Sequential(), dim=512 * 7 * 7)
    return network.eval().requires_grad_(False)


def vectors_of(
    model: nn.Module, path: Path, box: tuple[float, ...] | None, args: argparse.Namespace, device: torch.device
) -> Tensor:
    """Region vectors (R, C) of an image or of a box in it."""
    image = load_resized(path, args.S, box).to(device)
    with torch.no_grad():
        return region_vectors(model(image[None])[0], args.L)


def load_resized(path: Path, longer_px: int, box: tuple[float, ...] | None = None) -> Tensor:
    """A normalised image (3, H, W) with a longer side of ``longer_px``, cut to ``box`` (in pixels of the file)."""
    image = Image.fromarray(read_image(path).decode())
    scale = longer_px / max(image.size)
    size = tuple(round(side * scale) for side in image.size)
    pixels = normalize(to_tensor(image.resize(size, Image.Resampling.BILINEAR)), MEAN, STD)
    if box is None:
        return pixels
    left, top, right, bottom = (round(side * scale) for side in box)
    return pixels[:, top:bottom, left:right]


# --- Files ------------------------------------------------------------------------------------------------------------


def write_arrays(folder: Path, images: list, describe: Callable, on_bad_image: str, max_fraction: float) -> None:
    """``describe(path, box)`` of every image as ``<folder>/<i>.npy``; of one that is left out an empty array."""
    bad_images = BadImages.with_new_list(len(images), folder / "unreadable.txt", on_bad_image, max_fraction)
    for i, (path, box) in enumerate(tqdm(images, disable=not sys.stderr.isatty())):
        try:
            array = describe(path, box).numpy()
        except ImageError as error:
            bad_images.report(str(path), error)
            array = np.empty(0, np.float32)
        np.save(folder / f"{i}.npy", array)
    left_out = f", {bad_images.count()} of them of unreadable images" if bad_images.count() else ""
    print(f"{len(images)} files in {folder}{left_out}")


def read_arrays(folder: Path, stage: str) -> list[np.ndarray]:
    """All arrays that :func:`write_arrays` wrote, in their order."""
    files = sorted(folder.glob("*.npy"), key=lambda file: int(file.stem))
    if not files:
        raise ValueError(f"{folder} has no files: run --stage {stage} with the same --S, --L and --temp_dir first")
    return [np.load(file, allow_pickle=False) for file in files]


def stack(arrays: list[np.ndarray]) -> tuple[np.ndarray, set[int]]:
    """Descriptors (N, D), zeros for images that were left out, and the indices of these."""
    missing = {i for i, array in enumerate(arrays) if not array.size}
    if len(missing) == len(arrays):
        raise ValueError("none of the images could be read")
    dim = max(array.size for array in arrays)
    return np.stack([array if array.size else np.zeros(dim, np.float32) for array in arrays]), missing


def pca_file(folder: Path, name: str, size: int) -> Path:
    return folder / f"{name}_S{size}_PCA.npz"


def read_whitening(file: Path) -> Whitening:
    if not file.is_file():
        raise ValueError(f"{file} is missing: run --stage extract_train and train_pca on the other data set first")
    with np.load(file, allow_pickle=False) as arrays:
        return Whitening(torch.from_numpy(arrays["mean"]), torch.from_numpy(arrays["matrix"]))


def main() -> None:
    distributed.run_script(eval_retrieval, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
