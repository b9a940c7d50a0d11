"""A small stream of uncurated images, and labelled ones to learn what features of it are worth.

What makes images uncurated is here in small: a long tail of what they show, several sources that have nothing to do
with each other, frames of one video that hardly differ, and duplicates. The files come from the folder that the
environment variable ``UNCURATED_DATA`` names, with ``tiny_imagenet/train.tar`` and ``val.tar`` (a folder per class),
``cifar10/train.tar.gz`` and ``camvid/camvid.tar``.
"""

import io
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

LONG_TAIL, FRAMES, DUPLICATES = 0.5, 0.1, 0.1  # shares of the images of each kind, as far as there are so many
ROUNDED = 50  # images that a long tail may lack by rounding alone
PROBE_CLASSES = 20


def uncurated(folder: Path, image_size: int, seed: int, images: int = 6000) -> Path:
    """Write ``images`` images with sides of ``image_size`` pixels into ``folder``, without classes, and return it.

    Half are of Tiny-ImageNet, where class number r (in an order that is drawn) has a share of about 1 / (r + 10), or
    what it has; a tenth are frames of CamVid; a tenth duplicates of the others, some mirrored, all saved anew with
    losses; the rest is of CIFAR-10. What is there already stays.
    """
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    photographs, objects = (by_class(archive) for archive in ("tiny_imagenet/train.tar", "cifar10/train.tar.gz"))
    frames = sorted(name for name in names("camvid/camvid.tar") if name.split("/")[1] in ("train", "test", "val"))
    tail = long_tail(photographs, round(LONG_TAIL * images), rng)
    wanted = {name: round(share * images) for name, share in (("frames", FRAMES), ("duplicates", DUPLICATES))}
    missing = max(0, wanted["frames"] - len(frames)) + max(0, round(LONG_TAIL * images) - len(tail) - ROUNDED)
    others = images - round(LONG_TAIL * images) - sum(wanted.values()) + missing
    chosen = {
        "tiny_imagenet/train.tar": tail,
        "cifar10/train.tar.gz": rng.permutation(sorted(chain(*objects.values())))[:others].tolist(),
        "camvid/camvid.tar": rng.permutation(frames)[: wanted["frames"]].tolist(),
    }
    written = []
    for archive, members in chosen.items():
        for name, image in read(archive, set(members)):
            written.append(folder / f"{archive.split('/')[0]}_{name.replace('/', '_').rsplit('.', 1)[0]}.png")
            square(image, image_size).save(written[-1])
    for number, i in enumerate(rng.permutation(len(written))[: wanted["duplicates"]]):
        image = Image.open(written[i])
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if number % 3 == 0 else image
        image.save(folder / f"duplicate_{number:04}.jpg", quality=int(rng.integers(50, 90)))
    (folder / "done").touch()
    return folder


def probe_images(folder: Path, image_size: int) -> Path:
    """Write ``train/`` and ``val/`` of the first 20 classes of Tiny-ImageNet, 100 and 30 images each; the folder."""
    if (folder / "done").exists():
        return folder
    for split in ("train", "val"):
        classes = by_class(f"tiny_imagenet/{split}.tar")
        members = [name for label in sorted(classes)[:PROBE_CLASSES] for name in classes[label]]
        for name, image in read(f"tiny_imagenet/{split}.tar", set(members)):
            file = (folder / split / class_of(name) / Path(name).name).with_suffix(".png")
            file.parent.mkdir(parents=True, exist_ok=True)
            square(image, image_size).save(file)
    (folder / "done").touch()
    return folder


def long_tail(classes: dict[str, list[str]], images: int, rng: np.random.Generator) -> list[str]:
    """About so many images, most of them of few classes, at least one of each."""
    order = rng.permutation(sorted(classes))
    shares = 1 / (np.arange(len(order)) + 10.0)
    wanted = np.maximum(1, np.round(images * shares / shares.sum()).astype(int))
    return [
        name for label, n in zip(order, wanted, strict=True) for name in rng.permutation(sorted(classes[label]))[:n]
    ]


def square(image: Image.Image, side: int) -> Image.Image:
    """The centre, resized."""
    short = min(image.size)
    left, top = ((length - short) // 2 for length in image.size)
    centre = image.convert("RGB").crop((left, top, left + short, top + short))
    return centre.resize((side, side), Image.Resampling.BICUBIC)


# --- Archives ---------------------------------------------------------------------------------------------------------


def open_archive(archive: str) -> tarfile.TarFile:
    """One of the files below the folder of ``UNCURATED_DATA``."""
    if "UNCURATED_DATA" not in os.environ:
        raise ValueError("UNCURATED_DATA is not set: name the folder with tiny_imagenet/, cifar10/ and camvid/")
    return tarfile.open(Path(os.environ["UNCURATED_DATA"]) / archive)


def names(archive: str) -> list[str]:
    with open_archive(archive) as files:
        return [file.name for file in files if file.isfile()]


def class_of(name: str) -> str:
    """The folder in which a file lies."""
    return name.split("/")[-2]


def by_class(archive: str) -> dict[str, list[str]]:
    classes = defaultdict(list)
    for name in names(archive):
        classes[class_of(name)].append(name)
    return classes


def read(archive: str, wanted: set[str]) -> Iterator[tuple[str, Image.Image]]:
    """The wanted members in the order of the archive."""
    with open_archive(archive) as files:
        for file in files:
            if file.name in wanted:
                yield file.name, Image.open(io.BytesIO(files.extractfile(file).read()))
