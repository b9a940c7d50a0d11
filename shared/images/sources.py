"""Where images come from: what ``--data_path`` may name."""

import fcntl
import os
import re
import socket
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torchvision

from .decode import EXTENSIONS, DecodedImage, EncodedImage, read_image

SPLITS = ("train", "val", "all")
HOLDOUT_SHARE = 10  # one image in ten


class ImageSource:
    """A list of images; what every data set looks like to the rest of the code.

    Attributes:
        name: Short description of where the images come from.
        labels: Class indices, int64, shape (N,), or None.
        classes: Names of the classes in the order of their indices, or None.
    """

    def __init__(self, name: str, labels: np.ndarray | None, classes: Sequence[str] | None):
        self.name = name
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.classes = None if classes is None else list(classes)

    def __len__(self) -> int:
        raise NotImplementedError

    def path(self, index: int) -> str:
        """File, or another name that identifies image ``index``."""
        raise NotImplementedError

    def load(self, index: int) -> EncodedImage | DecodedImage:
        """Image ``index``, not decoded yet. Raises ``ImageError`` if it cannot be read."""
        raise NotImplementedError

    def label(self, index: int) -> int:
        """Class of image ``index``; -1 where there are no classes."""
        return -1 if self.labels is None else int(self.labels[index])

    def checksum(self) -> int:
        """CRC-32 of all names below the data set's root (of the pixels where there are no files) and of the labels."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line for the log."""
        classes = "no classes" if self.classes is None else f"{len(self.classes):,} classes"
        return f"{self.name}: {len(self):,} images, {classes}"


class PackedStrings(Sequence[str]):
    """Strings in one array of bytes: a million file names that forked workers share instead of copying."""

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def checksum(self) -> int:
        return zlib.crc32(self._ends, zlib.crc32(self._bytes))

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())


class FileSource(ImageSource):
    """Image files below (or, with absolute names, outside) a folder.

    Args:
        root: Folder the names are relative to.
        names: File names.
    """

    def __init__(self, name: str, root: str | os.PathLike, names: Iterable[str], labels=None, classes=None):
        super().__init__(name, labels, classes)
        self.root = os.fspath(root)
        self.names = PackedStrings(names)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def load(self, index: int) -> EncodedImage:
        return read_image(self.path(index))

    def checksum(self) -> int:
        return self.names.checksum() if self.labels is None else zlib.crc32(self.labels, self.names.checksum())


class ArraySource(ImageSource):
    """Images that lie decoded in memory.

    Args:
        pixels: uint8, shape (N, H, W) for grey or (N, H, W, 3) for RGB.
    """

    def __init__(self, name: str, pixels: np.ndarray, labels=None, classes=None):
        super().__init__(name, labels, classes)
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def path(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def load(self, index: int) -> DecodedImage:
        pixels = self.pixels[index]
        return DecodedImage(np.repeat(pixels[..., None], 3, axis=-1) if pixels.ndim == 2 else pixels)

    def checksum(self) -> int:
        pixels = zlib.crc32(np.ascontiguousarray(self.pixels))
        return pixels if self.labels is None else zlib.crc32(self.labels, pixels)


def open_source(
    data_path: str | os.PathLike | None,
    split: str = "train",
    *,
    holdout: bool = False,
    allow_absolute_paths: bool = False,
    download_root: str | os.PathLike | None = None,
    flag: str = "--data_path",
) -> ImageSource:
    """Open the images that ``--data_path`` names.

    ==========================  ======================================================================================
    ``data_path``               images
    ==========================  ======================================================================================
    nothing                     the 1,797 handwritten digits of scikit-learn, 8x8; ``index % 5 == 4`` is val
    folder with class folders   as torchvision's ImageFolder: first-level folders are classes, any depth below
    folder with images          all images at any depth, no classes
    parent of ``train/``        ``train/`` or ``val/`` (else ``test/``), each one of the two above
    text list ``*.txt``         one path per line, relative to the list, and optionally a tab and a label
    name such as ``cifar10``    that torchvision data set, downloaded once; see ``TORCHVISION``
    ==========================  ======================================================================================

    A folder or list without a val part has one only if ``holdout`` asks for it: the images whose relative path has a
    CRC-32 divisible by 10; ``train`` is then the rest.

    Args:
        split: ``train``, ``val``, or ``all``: the folder or list as a whole, for a path that is the val part itself.
        holdout: Split a folder or list that has no val part.
        allow_absolute_paths: Accept absolute paths in a text list.
        download_root: Where torchvision data sets are kept; by default ``datasets`` beside torch.hub's folder.
        flag: Name of the option in error messages.

    Raises:
        ValueError: If the path does not exist, holds no images or lacks the split, or a download fails.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    if not data_path:
        return _embedded_digits(split)
    path = Path(data_path).expanduser()
    where = f"{flag} {data_path}"
    if path.is_dir():
        path, split, holdout = _choose_folder(path, split, holdout, where)
        names, labels, classes = _scan_folder(path, where)
    elif path.is_file() and path.suffix == ".txt":
        names, labels, classes = _read_list(path, allow_absolute_paths, where)
    elif path.exists():
        raise ValueError(f"{where}: neither a folder nor a .txt list of images")
    elif str(data_path).lower() in TORCHVISION:
        return _open_torchvision(str(data_path).lower(), split, download_root, where)
    else:
        raise ValueError(f"{where}: no such file or folder, and no data set of that name ({', '.join(TORCHVISION)})")

    name, root = str(path), path.parent if path.is_file() else path
    if split == "val" and not holdout:
        raise ValueError(f"{where}: has no val part; give a folder with train/ and val/, or the val images themselves")
    if holdout and split != "all":
        names, labels = _hold_out(names, labels, split)
        name += f" ({split} part)"
        if not names:
            raise ValueError(f"{where}: too few images, none of them falls into the {split} part")
    return FileSource(name, root, names, labels, classes)


def check_same_classes(train: ImageSource, val: ImageSource) -> None:
    """Raise ``ValueError`` unless both sources have classes and these are the same in the same order."""
    for source in (train, val):
        if source.classes is None:
            raise ValueError(f"{source.name} has no classes to evaluate: expected one folder per class, or labels")
    if train.classes != val.classes:
        missing = sorted(set(train.classes) - set(val.classes))[:5]
        extra = sorted(set(val.classes) - set(train.classes))[:5]
        raise ValueError(
            f"{val.name} has other classes than {train.name}: {len(val.classes)} against {len(train.classes)}"
            + (f", missing {', '.join(missing)}" if missing else "")
            + (f", additional {', '.join(extra)}" if extra else "")
        )


# ---------------------------------------------------------------------------------------------------------- sources


def _embedded_digits(split: str) -> ArraySource:
    from sklearn.datasets import load_digits  # a second of SciPy, which few runs need

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # grey levels 0..16
    is_val = np.arange(len(pixels)) % 5 == 4
    keep = {"train": ~is_val, "val": is_val, "all": np.ones_like(is_val)}[split]
    name = "embedded digits" if split == "all" else f"embedded digits ({split})"
    return ArraySource(name, pixels[keep], digits.target[keep], [str(digit) for digit in range(10)])


def _choose_folder(folder: Path, split: str, holdout: bool, where: str) -> tuple[Path, str, bool]:
    """Step into ``train/`` or ``val/`` where ``folder`` is the parent of both."""
    with os.scandir(folder) as entries:
        subfolders = {entry.name for entry in entries if entry.is_dir()}
    val = next((name for name in ("val", "test") if name in subfolders), None)
    if "train" not in subfolders or (val is None and subfolders != {"train"}):
        return folder, split, holdout
    if split == "all":
        raise ValueError(f"{where}: has a train folder, so ask for its train or its val part")
    if split == "train":
        return folder / "train", "train", holdout and val is None
    if val is None:
        return folder / "train", "val", holdout
    return folder / val, "all", False


def _scan_folder(root: Path, where: str) -> tuple[list[str], np.ndarray | None, list[str] | None]:
    """Relative names of all images in ImageFolder's order, their labels and the classes."""
    folders: list[tuple[str, list[str]]] = []
    for folder, _, files in sorted(os.walk(root, followlinks=True, onerror=_raise)):
        images = sorted(file for file in files if file.lower().endswith(EXTENSIONS))
        folders.append((os.path.relpath(folder, root), images))
    names = [os.path.normpath(os.path.join(folder, file)) for folder, files in folders for file in files]
    if not names:
        raise ValueError(f"{where}: no images ({' '.join(EXTENSIONS)}) in {root}")
    if any(files for folder, files in folders if folder == "."):
        return names, None, None
    class_of = [name.split(os.sep, 1)[0] for name in names]
    classes = sorted({folder for folder, _ in folders if folder != "." and os.sep not in folder})
    empty = sorted(set(classes) - set(class_of))
    if empty:
        raise ValueError(f"{where}: no images in the class folder(s) {', '.join(empty[:5])} of {root}")
    # ImageFolder goes class by class: "a-b" comes before "a/..." in the walk but after it in the list of classes.
    index_of = {name: index for index, name in enumerate(classes)}
    labels = np.array([index_of[name] for name in class_of])
    order = np.argsort(labels, kind="stable")
    return [names[i] for i in order], labels[order], classes


def _raise(error: OSError) -> None:
    raise error


def _read_list(path: Path, allow_absolute_paths: bool, where: str):
    names, texts = [], []
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            name, tab, label = line.rstrip("\n").partition("\t")
            if not name:
                continue
            if "\0" in name:
                raise ValueError(f"{where}, line {number}: not a text list")
            if os.path.isabs(name) and not allow_absolute_paths:
                raise ValueError(
                    f"{where}, line {number}: {name} is absolute; paths are relative to the list, unless "
                    "--allow_absolute_paths is given"
                )
            if os.path.normpath(name).split(os.sep)[0] == os.pardir:
                raise ValueError(f"{where}, line {number}: {name} leads out of the list's folder")
            names.append(name)
            if tab:
                texts.append(label)
            if bool(tab) != bool(texts) or len(texts) not in (0, len(names)):
                raise ValueError(f"{where}, line {number}: either all lines have a label or none")
    if not names:
        raise ValueError(f"{where}: an empty list")
    if not texts:
        return names, None, None
    are_numbers = all(re.fullmatch(r"\s*-?[0-9]{1,18}\s*", text) for text in set(texts))
    classes = sorted(set(texts), key=int if are_numbers else None)
    index_of = {text: index for index, text in enumerate(classes)}
    return names, np.array([index_of[text] for text in texts]), classes


def _hold_out(names: list[str], labels: np.ndarray | None, split: str) -> tuple[list[str], np.ndarray | None]:
    checksums = np.array([zlib.crc32(os.fsencode(name.replace(os.sep, "/"))) for name in names])
    (keep,) = np.nonzero((checksums % HOLDOUT_SHARE == 0) == (split == "val"))
    return [names[i] for i in keep], None if labels is None else labels[keep]


# Class of torchvision.datasets, its arguments for the train part and for the val part.
TORCHVISION = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "fashion_mnist": ("FashionMNIST", {"train": True}, {"train": False}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}),
    "flowers102": ("Flowers102", {"split": "train"}, {"split": "test"}),
    "food101": ("Food101", {"split": "train"}, {"split": "test"}),
    "dtd": ("DTD", {"split": "train"}, {"split": "test"}),
    "fgvc_aircraft": ("FGVCAircraft", {"split": "trainval"}, {"split": "test"}),
    "imagenette": ("Imagenette", {"split": "train"}, {"split": "val"}),
}


def _open_torchvision(name: str, split: str, download_root: str | os.PathLike | None, where: str) -> ImageSource:
    if split == "all":
        raise ValueError(f"{where}: ask for the train or the val part")
    class_name, train_arguments, val_arguments = TORCHVISION[name]
    build = getattr(torchvision.datasets, class_name)
    arguments = train_arguments if split == "train" else val_arguments
    root = Path(download_root or Path(torch.hub.get_dir()).parent / "datasets")
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / f".{name}.lock"), _socket_timeout(30):  # one process downloads, the others find the files
        try:
            dataset = build(root, download=False, **arguments)
        except RuntimeError:  # "not found"
            try:
                dataset = build(root, download=True, **arguments)
            except (OSError, RuntimeError) as error:
                raise ValueError(
                    f"{where}: could not be downloaded to {root} ({error}). "
                    f"Without a network, put the files of torchvision.datasets.{class_name} there."
                ) from error
    title = f"{name} ({split})"
    classes = getattr(dataset, "classes", None)
    if not hasattr(dataset, "data"):  # a data set of files; torchvision has no public way to their names
        samples = getattr(dataset, "_samples", None) or zip(dataset._image_files, dataset._labels, strict=True)
        files, labels = zip(*samples, strict=True)
        return FileSource(title, root, files, labels, _class_names(classes, labels))
    labels = np.asarray(dataset.targets if hasattr(dataset, "targets") else dataset.labels)
    pixels = np.asarray(dataset.data)
    if pixels.ndim == 4 and pixels.shape[1] == 3:  # STL10 and SVHN are channels first
        pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    return ArraySource(title, pixels, labels, _class_names(classes, labels))


def _class_names(classes, labels) -> list[str]:
    if classes is None:
        return [str(label) for label in range(int(max(labels)) + 1)]
    return [name if isinstance(name, str) else "/".join(name) for name in classes]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes on a file, which is created."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
