"""Where images come from: what ``--data_path`` may name."""

import argparse
import difflib
import errno
import fcntl
import os
import re
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from shared import distributed

from .channels import Channels, are_asked_for, measure, read_values
from .decode import EXTENSIONS, MAX_PIXELS, DecodedImage, EncodedImage, read_image
from .materials import MATERIALS, load_materials
from .tables import names_an_image, read_cells

SPLITS = ("train", "val", "all")
HOLDOUT_SHARE = 10  # one image in ten
LISTS = (".txt", ".csv", ".tsv")
RUN = "attempt.json"  # in the output folder of a run
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test", "testing")  # the first one that is there
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
SYSTEM_FILES = ("Thumbs.db", "desktop.ini")
SCANNED = {}  # by folder and endings: the state of each folder in it, and its images
SETTLED_NS = 2 * 10**9  # after a change another one may leave the same time: clocks of file systems are coarse
# names of folders that group images by how they were made
NO_CLASS = re.compile(
    r"(plate|well|slide|batch|patient|pat|subject|subj|sub|donor|case|session|visit|scan|day|week|date|run|site|camera)"
    r"[ _.-]?\w{0,2}\d+|(19|20)\d{2}([-_.]?[01]\d([-_.]?[0-3]\d)?)?|[0-3]\d[-_.][01]\d[-_.](19|20)\d{2}",
    re.IGNORECASE,
)


class ImageSource:
    """A list of images; what every data set looks like to the rest of the code.

    Attributes:
        name: Short description of where the images come from.
        labels: Class indices, int64, shape (N,), or None.
        classes: Names of the classes in the order of their indices, or None.
        channels: How images that are no RGB are read, or None.
    """

    channels: Channels | None = None

    def __init__(self, name: str, labels: np.ndarray | None, classes: Sequence[str] | None):
        self.name = name
        self.labels = None if labels is None else np.array(labels, dtype=np.int64)
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
        remarks: What the log says besides, such as what was left out.
        max_pixels: Images with more are not read.
        channels: See above.
    """

    def __init__(
        self,
        name: str,
        root: str | os.PathLike,
        names: Iterable[str],
        labels=None,
        classes=None,
        remarks: str = "",
        max_pixels: int = MAX_PIXELS,
        channels: Channels | None = None,
    ):
        super().__init__(name, labels, classes)
        self.channels = channels
        self.root = os.fspath(root)
        self.names = names if isinstance(names, PackedStrings) else PackedStrings(names)
        self.remarks = remarks
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def load(self, index: int) -> EncodedImage | DecodedImage:
        if self.channels is not None:
            return self.channels.image(read_values(self.path(index), self.channels.number, self.max_pixels))
        return read_image(self.path(index), self.max_pixels)

    def describe(self) -> str:
        return super().describe() + (f" ({self.remarks})" if self.remarks else "")

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
    max_pixels: int = MAX_PIXELS,
    download_root: str | os.PathLike | None = None,
    flag: str = "--data_path",
    no_labels: bool = False,
    channels: Channels | None = None,
) -> ImageSource:
    """Open the images that ``--data_path`` names.

    ===========================  =====================================================================================
    ``data_path``                images
    ===========================  =====================================================================================
    nothing, or ``materials``    2,280 generated images, 32x32, 12 classes: :mod:`shared.images.materials`
    ``digits``                   the 1,797 handwritten digits of scikit-learn, 8x8; ``index % 5 == 4`` is val
    folder with class folders    as torchvision's ImageFolder: first-level folders are classes, any depth below
    folder with images           all images at any depth, no classes
    parent of ``train/``         ``train/`` or ``val/`` (or another usual name), each one of the two above
    list ``*.txt``               one path per line, relative to the list, and optionally a tab and a label
    table ``*.csv``, ``*.tsv``   the same with commas, semicolons or tabs, quotes and a heading
    name such as ``cifar10``     that torchvision data set, downloaded once; see ``TORCHVISION``
    ``package.module:function``  what this function returns: :mod:`shared.images.own_dataset`
    ===========================  =====================================================================================

    Hidden and system files, the folders of runs and files of other kinds are left out. A folder or list without a val
    part has one only if ``holdout`` asks for it: the images whose relative path has a CRC-32 divisible by 10; ``train``
    is then the rest.

    Args:
        split: ``train``, ``val``, or ``all``: the folder or list as a whole, for a path that is the val part itself.
        holdout: Split a folder or list that has no val part.
        allow_absolute_paths: Accept absolute paths in a text list.
        max_pixels: Larger images count as unreadable.
        download_root: Where torchvision data sets are kept; by default ``datasets`` beside torch.hub's folder.
        flag: Name of the option in error messages.
        no_labels: Take the folders, the second column or the targets of a data set for no classes.
        channels: How to read images that are no RGB, of files, among which are ``.npy`` then, or a Dataset.

    Raises:
        ValueError: If the path does not exist, holds no images or lacks the split, or a download fails.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    name = str(data_path or "materials").lower()
    if channels is not None and name in (*EMBEDDED, *TORCHVISION) and not (data_path and Path(data_path).exists()):
        raise ValueError(f"--in_chans {channels.number}: the images of {name} are RGB; name others as {flag}")
    if not data_path:
        return _materials(split, download_root)
    path = Path(data_path).expanduser()
    where = f"{flag} {data_path}"
    if path.is_dir():
        path, split, holdout = _choose_folder(path, split, holdout, where)
        extensions = EXTENSIONS if channels is None else (*EXTENSIONS, ".npy")
        names, labels, classes, remarks = _scan_folder(path, where, extensions)
    elif path.is_file() and path.suffix in LISTS:
        names, labels, classes = _read_list(path, allow_absolute_paths, where)
        remarks = ""
    elif path.exists():
        raise ValueError(f"{where}: neither a folder nor a list of images ({', '.join(LISTS)})")
    elif name in EMBEDDED:
        return EMBEDDED[name](split, download_root)
    elif name in TORCHVISION:
        return _open_torchvision(name, split, download_root, where)
    elif re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", str(data_path)):
        from .own_dataset import open_dataset  # which needs this module

        source = open_dataset(str(data_path), split, holdout, flag, channels)
        if no_labels:
            source.labels = source.classes = None
        return source
    else:
        known = (*EMBEDDED, *TORCHVISION)
        meant = f"; is {near} meant?" if (near := nearest_path(path, known)) else ""
        raise ValueError(f"{where}: no such file or folder, and no data set of that name ({', '.join(known)}){meant}")

    name, root = str(path), path.parent if path.is_file() else path
    if split == "val" and not holdout:
        raise ValueError(f"{where}: has no val part; give a folder with train/ and val/, or the val images themselves")
    if holdout and split != "all":
        names, labels = _hold_out(names, labels, split)
        name += f" ({split} part)"
        if not names:
            raise ValueError(f"{where}: too few images, none of them falls into the {split} part")
    if no_labels:
        labels = classes = None
    return FileSource(name, root, names, labels, classes, remarks, max_pixels, channels)


def has_parts(data_path: str | os.PathLike) -> bool:
    """Whether these images come only as a train and a val part, never as a whole."""
    path = Path(data_path).expanduser()
    if path.is_dir():
        return _choose_folder(path, "train", False, str(path))[0] != path
    return not path.exists() and str(data_path).lower() in TORCHVISION


def nearest_path(path: Path, names: Iterable[str] = ()) -> str | None:
    """What lies beside the first missing part of a path under the nearest name, or the nearest of ``names``."""
    missing = next(part for part in (*reversed(path.parents), path) if not part.exists())
    near = difflib.get_close_matches(missing.name, os.listdir(missing.parent), 1) if missing.parent.is_dir() else []
    near = [str(missing.with_name(name)) for name in near]
    return next(iter(near or difflib.get_close_matches(str(path).lower(), names, 1)), None)


def ask_about_classes(classes: Sequence[str] | None, learns_them: bool = True) -> None:
    """Print a question if what is taken for classes has the names of plates, patients or days.

    Args:
        learns_them: Whether the training does, or only evaluations use them.
    """
    if classes and all(map(NO_CLASS.fullmatch, classes)):
        without = "take --no_labels: there is no k-NN then, and pictures show no classes"
        others = "the network learns just that: name what they show in a table (.csv) of files and labels"
        distributed.print_once(
            f"NOTE: are {', '.join(classes[:3])}, ... classes? If they say how images were made, not what they show, "
            + (others if learns_them else without)
        )


def reading(args: argparse.Namespace) -> dict:
    """Arguments of :func:`open_source` from the flags of :func:`shared.run.flags.add_reading_flags`.

    Where :func:`shared.images.channels.add_channel_flags` ask for it, ``args.channels`` says how images are read. It is
    measured here unless a checkpoint has told it.
    """
    options = {
        "no_labels": getattr(args, "no_labels", False),
        "allow_absolute_paths": args.allow_absolute_paths,
        "max_pixels": round(1e6 * args.max_megapixels),
    }
    if are_asked_for(args):
        if not getattr(args, "channels", None):  # at the beginning of a run
            source = open_source(args.data_path, "train", **options, channels=Channels(args.in_chans))
            args.channels = measure(source, args.value_range)
        options["channels"] = Channels(**args.channels)
    return options


def check_same_classes(train: ImageSource, val: ImageSource, hint: str = "") -> None:
    """Raise ``ValueError`` unless both sources have classes and these are the same in the same order.

    Args:
        hint: End of the message about differing classes.
    """
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
            + ("" if missing or extra else ", the same in another order")
            + hint
        )


# ---------------------------------------------------------------------------------------------------------- sources


def _materials(split: str, root: str | os.PathLike | None) -> ArraySource:
    parts = [load_materials(part, root) for part in (("train", "val") if split == "all" else (split,))]
    pixels, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("pixels", "labels"))
    return ArraySource(_embedded_name("materials", split), pixels, labels, MATERIALS)


def _digits(split: str, root: str | os.PathLike | None) -> ArraySource:
    from sklearn.datasets import load_digits  # a second of SciPy, which few runs need

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # grey levels 0..16
    is_val = np.arange(len(pixels)) % 5 == 4
    keep = {"train": ~is_val, "val": is_val, "all": np.ones_like(is_val)}[split]
    return ArraySource(
        _embedded_name("digits", split), pixels[keep], digits.target[keep], [str(digit) for digit in range(10)]
    )


def _embedded_name(name: str, split: str) -> str:
    return f"embedded {name}" + ("" if split == "all" else f" ({split})")


EMBEDDED = {"materials": _materials, "digits": _digits}


def _choose_folder(folder: Path, split: str, holdout: bool, where: str) -> tuple[Path, str, bool]:
    """Step into ``train/`` or ``val/`` where ``folder`` is the parent of both; they may have other usual names."""
    with os.scandir(folder) as entries:
        subfolders = {entry.name for entry in entries if _is_dir(entry) and not _is_of_the_system(entry.name)}
    by_name = {name.lower(): name for name in sorted(subfolders)}
    train = next((by_name[name] for name in TRAIN_NAMES if name in by_name), None)
    val = next((by_name[name] for name in VAL_NAMES if name in by_name), None)
    if train is None and not (subfolders and set(by_name) <= set(VAL_NAMES)):
        return folder, split, holdout
    if train is None or (val is None and len(subfolders) > 1):
        raise ValueError(
            f"{where}: {train or val} would be a class ({', '.join(sorted(subfolders)[:5])}); give one part itself, or "
            f"a folder of {TRAIN_NAMES[0]}/ and {VAL_NAMES[0]}/, or rename the folder if it is a class"
        )
    if split == "all":
        raise ValueError(f"{where}: has a {train} folder, so ask for its train or its val part")
    if split == "train":
        return folder / train, "train", holdout and val is None
    if val is None:
        return folder / train, "val", holdout
    return folder / val, "all", False


def _is_of_the_system(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS or name in SYSTEM_FILES


def _walk(root: str) -> Iterator[tuple[str, tuple[int, ...], list[str], list[str]]]:
    """(folder, its state, its files, links that lead to a folder above) for all folders below ``root``, links followed.

    Left out are what belongs to the system and the folders of runs, which hold ``RUN``; of a root that is one itself,
    its pictures.
    """
    pending = [(root, _state(root), frozenset([_state(root)[:2]]))]
    while pending:
        folder, state, ancestors = pending.pop()
        with os.scandir(folder) as entries:
            entries = sorted((e for e in entries if not _is_of_the_system(e.name)), key=lambda entry: entry.name)
        files, loops, folders = [], [], []
        for entry in entries:
            if not _is_dir(entry):
                files.append(entry.name)
            elif (below := _state(entry.path))[:2] in ancestors:
                loops.append(entry.path)
            else:
                folders.append((entry.path, below, ancestors | {below[:2]}))
        is_run = RUN in files
        if is_run and folder != root:
            continue
        pending += [some for some in folders if not (is_run and os.path.basename(some[0]) == "pictures")]
        yield folder, state, files, loops


def _is_dir(entry: os.DirEntry) -> bool:
    with suppress(OSError):  # a link to itself
        return entry.is_dir()
    return False


def _state(folder: str) -> tuple[int, int, int]:
    """Which folder it is (the first two), and when its entries changed."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _is_as_it_was(states: Mapping[str, tuple[int, ...]]) -> bool:
    with suppress(OSError):
        return all(_state(folder) == state for folder, state in states.items())
    return False


def _scan_folder(
    root: Path, where: str, extensions: tuple[str, ...]
) -> tuple[PackedStrings, np.ndarray | None, list[str] | None, str]:
    """Relative names of all images in ImageFolder's order, their labels and the classes, and remarks.

    The training and each evaluation of a run ask for them: files are listed again only after a folder has changed.
    """
    key, began_ns = (os.path.abspath(root), extensions), time.time_ns()
    states, found = SCANNED.get(key, ({}, None))
    if states and _is_as_it_was(states):
        return found
    walked = sorted(_walk(str(root)))
    names, *rest = _images_of(walked, root, where, extensions)
    found = PackedStrings(names), *rest
    states = {os.path.abspath(folder): state for folder, state, *_ in walked}
    SCANNED.pop(key, None)
    if began_ns - max(changed for *_, changed in states.values()) > SETTLED_NS:
        SCANNED[key] = states, found
    return found


def _images_of(
    walked: Sequence[tuple], root: Path, where: str, extensions: tuple[str, ...]
) -> tuple[list[str], np.ndarray | None, list[str] | None, str]:
    folders: list[tuple[str, list[str]]] = []
    other_files, remarks = Counter(), []
    for folder, _, files, loops in walked:
        images = [file for file in files if file.lower().endswith(extensions)]
        other_files.update(os.path.splitext(file)[1].lower() or file for file in set(files) - set(images))
        folders.append((os.path.relpath(folder, root), images))
        remarks += [f"left out: the link {loop} to a folder above it" for loop in loops]
    if other_files:
        kinds = ", ".join(f"{count} {kind}" for kind, count in other_files.most_common(5))
        remarks.append(f"left out: {kinds}" + (", ..." if len(other_files) > 5 else ""))
    names = [os.path.normpath(os.path.join(folder, file)) for folder, files in folders for file in files]
    if not names:
        hint = "; --in_chans N reads .npy" if other_files[".npy"] else ""
        raise ValueError(f"{where}: no images ({' '.join(extensions)}) in {root}{hint}")
    loose = [file for folder, files in folders if folder == "." for file in files]
    if loose:
        if len(loose) < len(names):
            remarks.append(f"no classes: {loose[0]} lies beside the folders")
        return names, None, None, "; ".join(remarks)
    class_of = [name.split(os.sep, 1)[0] for name in names]
    classes = sorted({folder for folder, _ in folders if folder != "." and os.sep not in folder})
    empty = sorted(set(classes) - set(class_of))
    of_runs = [name for name in empty if (root / RUN).exists() or any((root / name).rglob(RUN))]
    classes, empty = (sorted({*some} - {*of_runs}) for some in (classes, empty))
    if empty:
        raise ValueError(f"{where}: no images in the class folder(s) {', '.join(empty[:5])} of {root}")
    # ImageFolder goes class by class: "a-b" comes before "a/..." in the walk but after it in the list of classes.
    index_of = {name: index for index, name in enumerate(classes)}
    labels = np.array([index_of[name] for name in class_of])
    order = np.argsort(labels, kind="stable")
    return [names[i] for i in order], labels[order], classes, "; ".join(remarks)


def _read_list(path: Path, allow_absolute_paths: bool, where: str):
    """Names, labels and classes of a list or table of images."""
    lines = read_cells(path, where, "\t" if path.suffix == ".txt" else None)
    if len(lines) > 1 and not names_an_image(lines[0][1][0]) and names_an_image(lines[1][1][0]):
        lines = lines[1:]  # a heading
    if not lines:
        raise ValueError(f"{where}: an empty list")
    columns = len(lines[0][1])
    for number, cells in lines:
        name = cells[0]
        if "\0" in name:
            raise ValueError(f"{where}, line {number}: not a text list")
        if len(cells) > 2:
            raise ValueError(f"{where}, line {number}: expected a file name and a label, got {len(cells)} columns")
        if len(cells) != columns:
            raise ValueError(f"{where}, line {number}: either all lines have a label or none")
        if not all(cells):
            raise ValueError(f"{where}, line {number}: expected {('a file name', 'a label')[bool(name)]}, got none")
        if os.path.isabs(name) and not allow_absolute_paths:
            raise ValueError(
                f"{where}, line {number}: {name} is absolute; paths are relative to the list, unless "
                "--allow_absolute_paths is given"
            )
        if os.path.normpath(name).split(os.sep)[0] == os.pardir:
            raise ValueError(f"{where}, line {number}: {name} leads out of the list's folder")
    names = [cells[0] for _, cells in lines]
    if not any((path.parent / name).exists() for name in names[:20]):
        number, cells = lines[0]
        separator = "a tab" if path.suffix == ".txt" else "a tab, semicolon or comma"
        raise ValueError(
            f"{where}, line {number}: there is no {cells[0]!r} beside the list; {separator} separates a name from its "
            "label, and / one folder from the next"
        )
    if columns == 1:
        return names, None, None
    texts = [cells[1] for _, cells in lines]
    are_numbers = all(re.fullmatch(r"-?[0-9]{1,18}", text) for text in set(texts))
    classes = sorted(set(texts), key=int if are_numbers else None)
    index_of = {text: index for index, text in enumerate(classes)}
    return names, np.array([index_of[text] for text in texts]), classes


def _hold_out(names: Sequence[str], labels: np.ndarray | None, split: str) -> tuple[list[str], np.ndarray | None]:
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
    from torchvision import datasets  # here: the import takes a second, and folders need none of it

    if split == "all":
        raise ValueError(f"{where}: ask for the train or the val part")
    class_name, train_arguments, val_arguments = TORCHVISION[name]
    build = getattr(datasets, class_name)
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
    """Hold an exclusive lock between processes on a file, which is created.

    Raises:
        ValueError: If the file system knows no locks, and a process that was killed has left the file that stands for
            one.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            with _lock_file(path.with_name(path.name + ".locked")):
                yield
            return
        yield


@contextmanager
def _lock_file(path: Path, patience_s: float = 600) -> Iterator[None]:
    """What holds processes apart where a file system has no locks (Lustre and some NFS): who makes the file has it.

    Its time is renewed for as long as it is held, however long a cache takes to fill.
    """
    seen, end = None, time.monotonic() + patience_s
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            with suppress(FileNotFoundError):
                if (renewed := path.stat().st_mtime_ns) != seen:
                    seen, end = renewed, time.monotonic() + patience_s
            if time.monotonic() > end:
                raise ValueError(f"{path} is {patience_s:.0f} s old; remove it if no run uses it") from None
            time.sleep(0.05)
    done = threading.Event()

    def renew():
        while not done.wait(patience_s / 10):
            os.utime(path)

    (renewing := threading.Thread(target=renew, daemon=True)).start()
    try:
        yield
    finally:
        done.set()
        renewing.join()
        path.unlink(missing_ok=True)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
