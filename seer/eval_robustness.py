"""Accuracy of a fine-tuned network on corrupted images and on other test sets (Goyal et al. 2022, section 5).

    python eval_robustness.py                                # embedded materials, the network of fine_tune.py
    python eval_robustness.py --pretrained seer_128gf_in1k --data_path /path/to/imagenet \\
        --sets /path/to/imagenetv2 /path/to/imagenet-a /path/to/imagenet-r /path/to/sketch --output_dir /path/to/robust

A set is a folder with a folder per class, named as the classes of ``--data_path``, or numbered like ImageNet-V2.
Classes of which a set has no images are not predicted, as for ImageNet-A and -R. The corruptions are eight of our own,
each at five severities, applied to the crop that the network sees: their numbers compare with those of the same script
only.
"""

import argparse
import json
import sys
import zlib
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import cv2
import numpy as np
import torch
from torch import Tensor

from seer.eval_linear import network_parser
from seer.hub import CARD, MEAN, STD
from seer.regnet import SIZES, RegNet
from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.flags import add_data_flags, add_process_flags, parse_evaluation
from shared.images.labelled import match_val
from shared.images.loading import EvalDataset, EvalTransform
from shared.images.sources import ImageSource, open_source, reading
from shared.networks.classifiers import load_completely
from shared.networks.pretrained import locate, read_weights
from shared.networks.weights import WeightMismatch, safe_load
from shared.optimisation.precision import Precision
from shared.pictures.sheets import Tile, save_sheet
from shared.run.files import atomic_file
from shared.supervised.evaluation import evaluate_classifier

SEVERITIES = (1, 2, 3, 4, 5)

# --- Corruptions ------------------------------------------------------------------------------------------------------

Pixels = np.ndarray  # (H, W, 3), uint8


def noise(pixels: Pixels, deviation: float, rng: np.random.Generator) -> np.ndarray:
    return pixels + rng.normal(0, deviation, pixels.shape)


def specks(pixels: Pixels, share: float, rng: np.random.Generator) -> np.ndarray:
    """Pixels that are black or white."""
    drawn = rng.random(pixels.shape[:2])[..., None]
    return np.where(drawn < share / 2, 0, np.where(drawn > 1 - share / 2, 255, pixels))


def blur(pixels: Pixels, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """By ``sigma`` pixels of an image of 224."""
    return cv2.GaussianBlur(pixels, (0, 0), sigma * max(min(pixels.shape[:2]) / 224, 0.25))


def contrast(pixels: Pixels, factor: float, rng: np.random.Generator) -> np.ndarray:
    mean = pixels.mean(axis=(0, 1))
    return mean + (pixels - mean) * factor


def brightness(pixels: Pixels, share: float, rng: np.random.Generator) -> np.ndarray:
    return pixels + 255 * share


def fog(pixels: Pixels, share: float, rng: np.random.Generator) -> np.ndarray:
    """A white layer whose thickness changes smoothly over the image."""
    coarse = rng.random((6, 6)).astype(np.float32)
    smooth = cv2.resize(coarse, pixels.shape[1::-1], interpolation=cv2.INTER_CUBIC).clip(0, 1)[..., None]
    share = share * (0.5 + smooth) / 1.5
    return pixels * (1 - share) + 255 * share


def jpeg(pixels: Pixels, quality: int, rng: np.random.Generator) -> np.ndarray:
    _, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)  # channels in the order in which they came


def pixelation(pixels: Pixels, share: float, rng: np.random.Generator) -> np.ndarray:
    height, width = pixels.shape[:2]
    size = max(1, round(width * share)), max(1, round(height * share))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)


CORRUPTIONS = {  # with their strength at each severity
    "noise": (noise, (10, 20, 35, 55, 80)),
    "specks": (specks, (0.02, 0.05, 0.1, 0.17, 0.27)),
    "blur": (blur, (1.5, 2.5, 4, 6, 9)),
    "contrast": (contrast, (0.6, 0.45, 0.3, 0.2, 0.1)),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.42, 0.55)),
    "fog": (fog, (0.3, 0.42, 0.54, 0.66, 0.78)),
    "jpeg": (jpeg, (25, 18, 12, 8, 5)),
    "pixelation": (pixelation, (0.6, 0.45, 0.33, 0.25, 0.18)),
}


def corrupt(pixels: Pixels, name: str, severity: int) -> Pixels:
    """A corrupted image, uint8; what is random depends on the pixels, the corruption and nothing else."""
    rng = np.random.default_rng(zlib.crc32(pixels.tobytes(), zlib.crc32(name.encode())))
    change, strengths = CORRUPTIONS[name]
    return np.clip(np.rint(change(pixels, strengths[severity - 1], rng)), 0, 255).astype(np.uint8)


class CorruptedCrop:
    """The crop that the network sees, corrupted, then normalised; without a name as it is."""

    def __init__(self, transform: EvalTransform, name: str = "", severity: int = 0):
        self.crop = EvalTransform(transform.resize_px, transform.crop_px, interpolation=transform.interpolation)
        self.name, self.severity = name, severity

    def __call__(self, pixels: np.ndarray) -> Tensor:
        view = self.crop(pixels)
        if self.name:
            corrupted = corrupt(np.ascontiguousarray(view.permute(1, 2, 0).numpy()), self.name, self.severity)
            view = torch.from_numpy(corrupted).permute(2, 0, 1)
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        return (view.float() / 255 - mean) / std


# --- Networks and sets ------------------------------------------------------------------------------------------------


def load_classifier(arch: str | None, pretrained: str) -> tuple[RegNet, int | None]:
    """A fine-tuned network, and the side in pixels for which it was trained, where its file says it."""
    if pretrained == "":
        raise ValueError("--pretrained: name a run of fine_tune.py, a file or a release such as seer_128gf_in1k")
    path = locate(CARD, pretrained)
    weights = read_weights(CARD, path)
    tensors = weights.tensors | {name: value for name, value in weights.head.items() if name.startswith("fc.")}
    if "fc.weight" not in tensors:
        raise WeightMismatch(f"--pretrained {pretrained} has no classifier: fine_tune.py makes one")
    contents = safe_load(path)
    flags = contents.get("flags", {}) if isinstance(contents, dict) else {}
    first = len(tensors["trunk_output.block1.block1-0.f.c.0.weight"])
    found = next((name for name, sizes in SIZES.items() if sizes.stages()[0].width == first), "")
    arch = arch or flags.get("arch") or found
    if arch not in SIZES:
        raise WeightMismatch(f"--pretrained {pretrained} is none of {', '.join(SIZES)}")
    network = RegNet(SIZES[arch], tensors["stem.0.weight"].shape[1], len(tensors["fc.weight"]))
    load_completely(network, tensors, str(path))
    return network.eval().requires_grad_(False), flags.get("image_size")


def open_set(path: str, train: ImageSource, **options) -> tuple[ImageSource, list[int]]:
    """The images of a set, whose folders are called as classes of ``train`` or by their numbers; classes it lacks."""
    images = open_source(path, "all", flag="--sets", **options)
    if images.classes and all(name.isdigit() for name in images.classes) and not set(images.classes) & {*train.classes}:
        if (largest := max(map(int, images.classes))) >= len(train.classes):
            raise ValueError(f"--sets {path}: there is a class {largest}, and --data_path has {len(train.classes)}")
        images.classes = [train.classes[int(name)] for name in images.classes]
    return match_val(train, images, shared_classes_only=True)


# --- Evaluation -------------------------------------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = network_parser(__doc__)
    add = add_data_flags(parser, batch_size=64)
    add("--sets", nargs="*", default=[], help="folders of other test sets")
    every = tuple(CORRUPTIONS)
    add("--corruptions", nargs="*", default=every, choices=every, help="of the val images of --data_path")
    add("--severities", type=int, nargs="+", default=SEVERITIES, choices=SEVERITIES, help="of each corruption")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default=".", help="for robustness.json and corruptions.png")
    add("--seed", type=int, default=0, help="nothing is drawn from it")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    embedded = {"pretrained": "runs/materials/fine_tuned", "output_dir": "runs/materials/robustness", "image_size": 32}
    return parse_evaluation(get_args_parser(), arguments, **embedded)


def eval_robustness(args: argparse.Namespace) -> dict[str, float]:
    """Top-1 in percent by name: ``clean``, ``<corruption> <severity>``, ``corrupted`` (their mean), names of sets."""
    names = ["clean", "corrupted", *(f"{name} {s}" for name in {*args.corruptions} for s in {*args.severities})]
    names += [Path(path).absolute().name for path in args.sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--sets: results are told by the names of the folders; there would be two of {twice[0]!r}")
    device, output_dir = frozen.start(args), Path(args.output_dir)
    network, trained_px = load_classifier(args.arch, args.pretrained)
    args.image_size = args.image_size or trained_px or 384
    train, val = frozen.labelled_sources(args, classifier=args.pretrained)
    if network.fc.out_features != len(train.classes):
        raise ValueError(
            f"--pretrained {args.pretrained} has {network.fc.out_features} outputs, and --data_path "
            f"{args.data_path} {len(train.classes)} classes"
        )
    transform = frozen.eval_transform(CARD, args.image_size, network)
    precision = Precision(args.amp, device)
    evaluate = partial(evaluate_classifier, network.to(device), precision=precision)

    def top1(images: ImageSource, view: CorruptedCrop, absent: list[int] | tuple = ()) -> float:
        data = EvalDataset(images, view, frozen.bad_images_of(args, images, output_dir / "bad_images_val.txt"))
        return evaluate(data, batch_size=args.batch_size, num_workers=args.num_workers, absent=absent)["acc1"]

    found = {"clean": top1(val, CorruptedCrop(transform))}
    corrupted = {
        f"{name} {severity}": top1(val, CorruptedCrop(transform, name, severity))
        for name in args.corruptions
        for severity in args.severities
    }
    found |= corrupted
    if corrupted:
        found["corrupted"] = sum(corrupted.values()) / len(corrupted)
    for path in args.sets:
        images, absent = open_set(path, train, **reading(args))
        found[Path(path).absolute().name] = top1(images, CorruptedCrop(transform), absent)
    if distributed.is_main_process():
        write(found, val, transform, args, output_dir)
    return found


def write(found: dict, val: ImageSource, transform: EvalTransform, args: argparse.Namespace, output_dir: Path) -> None:
    """robustness.json, what an image looks like, and a table."""
    for name in args.corruptions:
        values = " ".join(f"{found[f'{name} {severity}']:6.2f}" for severity in args.severities)
        print(f"{name:<11}{values}")
    for name, value in found.items():
        if name.rpartition(" ")[0] not in args.corruptions:
            print(f"{name:<11}{value:6.2f}", flush=True)
    with atomic_file(output_dir / "robustness.json") as file:
        file.write_text(json.dumps(found, indent=1) + "\n")
    pixels = np.ascontiguousarray(CorruptedCrop(transform).crop(val.load(0).decode()).permute(1, 2, 0).numpy())
    rows = [
        [Tile(pixels, "as it is"), *(Tile(corrupt(pixels, name, s), f"{name} {s}") for s in (1, 3, 5))]
        for name in args.corruptions
    ]
    if rows:
        save_sheet(rows, output_dir / "corruptions.png", "An image under every corruption")


def main() -> None:
    distributed.run_script(eval_robustness, parse_args)


if __name__ == "__main__":
    main()
