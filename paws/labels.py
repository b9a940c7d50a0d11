"""Which of the images have a label: a CSV file, an ``unlabeled/`` folder, the official lists, or a draw."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shared import distributed
from shared.images.cache import cache_images
from shared.images.loading import default_num_workers
from shared.images.sources import FileSource, ImageSource, open_source, reading
from shared.images.subsets import listed_images
from shared.images.tables import label_of_each, read_labels
from shared.run.randomness import derive_seed

UNLABELED_FOLDERS = ("unlabeled", "unlabelled")
OFFICIAL_CIFAR_FRAC = 0.92
LABEL_FLAGS = ("labels", "labels_per_class", "unlabeled_frac", "subset_path", "data_seed", "min_confidence")


@dataclass
class PartlyLabelled:
    """Images of which some have a label.

    Attributes:
        source: All images.
        labels: Class of every image, -1 where it is unknown, int64, shape (N,).
        classes: Names of the classes.
        how: Where the labels come from, for the log.
        truth: Class of every image where it is known although it is not used, else None; for evaluations only.
    """

    source: ImageSource
    labels: np.ndarray
    classes: list[str]
    how: str
    truth: np.ndarray | None = None

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def labelled(self) -> np.ndarray:
        """Indices of the images that have a label."""
        return np.flatnonzero(self.labels >= 0)

    @property
    def unlabelled(self) -> np.ndarray:
        """Indices of those that have none."""
        return np.flatnonzero(self.labels < 0)

    @property
    def fewest(self) -> int:
        """Labels of the class that has the fewest."""
        return int(np.bincount(self.labels[self.labelled]).min())

    def describe(self) -> str:
        counts = np.bincount(self.labels[self.labelled], minlength=len(self.classes))
        return (
            f"{self.source.name}: {len(self.source):,} images; {len(self.labelled):,} labels of {len(self.classes):,} "
            f"classes ({counts.min()} to {counts.max()} of each) from {self.how}"
        )


def open_partly_labelled(
    data_path: str | None,
    *,
    labels: Sequence[str] | None = None,
    labels_per_class: int | None = None,
    unlabeled_frac: float = 0.9,
    subset_path: str | None = None,
    data_seed: int | None = None,
    min_confidence: float | None = None,
    **reading_options,
) -> PartlyLabelled:
    """Open ``--data_path`` and find out which images have a label.

    ======================================  ===========================================================================
    given                                   labelled images
    ======================================  ===========================================================================
    ``--labels labels.csv ...``             those of the files: image relative to the folder, label; of pseudo-labels
                                            those with a confidence of ``--min_confidence`` or more
    class folders and ``unlabeled/``        those in the class folders
    ``--subset_path``                       those of a list, or of the official list in a folder of them
    ``--labels_per_class``                  so many of every class, drawn with ``--data_seed``
    none of these                           each with probability 1 - ``--unlabeled_frac``, as in the official code
    ======================================  ===========================================================================

    ``reading_options`` are those of :func:`shared.images.sources.open_source`.

    Raises:
        ValueError: If the labels do not fit the images, or a class is left without a label.
    """
    source = open_source(data_path, "train", **reading_options)
    given = [
        f"--{name}"
        for name, value in (("labels", labels), ("labels_per_class", labels_per_class), ("subset_path", subset_path))
        if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: give one of them, each says which images have a label")
    if min_confidence is not None and labels is None:
        raise ValueError(f"--min_confidence {min_confidence}: there is no table of --labels that it could choose from")
    if labels is not None:
        found = from_tables(source, labels, min_confidence)
    elif source.classes is None:
        raise ValueError(
            f"--data_path {data_path}: the images have no labels; give them as --labels labels.csv, or put the "
            "labelled images into class folders beside a folder unlabeled/"
        )
    elif any(name in UNLABELED_FOLDERS for name in source.classes):
        if given:
            raise ValueError(
                f"{given[0]}: the unlabeled/ folder of {source.name} says already which images have labels"
            )
        found = from_class_folders(source)
    elif subset_path is not None:
        path = find_list(subset_path, unlabeled_frac, data_seed, source)
        found = keep_labels(source, listed_indices(source, path), str(path))
    elif labels_per_class is not None:
        chosen = drawn_per_class(source.labels, labels_per_class, data_seed or 0, source.classes)
        how = f"--labels_per_class {labels_per_class}, drawn with --data_seed {data_seed or 0}"
        found = keep_labels(source, chosen, how)
    else:
        chosen = drawn_by_share(len(source), unlabeled_frac)
        found = keep_labels(source, chosen, f"a draw of {100 * (1 - unlabeled_frac):.3g} % of the images")
    without = sorted(set(range(len(found.classes))) - set(found.labels.tolist()))
    if without:
        raise ValueError(
            f"{len(without)} of {len(found.classes)} classes have no labelled image ({found.how}), the first is "
            f"{found.classes[without[0]]!r}"
        )
    if len(found.classes) < 2:
        raise ValueError(f"there is only one class, {found.classes[0]!r}: nothing is to be told apart")
    return found


def open_images(args: argparse.Namespace) -> PartlyLabelled:
    """The images and labels that the flags of a program name, cached if ``--cache`` says so.

    Fills in ``--num_workers``, which depends on the machine.
    """
    asked = {name: getattr(args, name) for name in LABEL_FLAGS}
    images = open_partly_labelled(args.data_path, **asked, **reading(args))
    distributed.print_once(images.describe())
    images.source = cache_images(images.source, args.cache)
    if args.num_workers is None:
        args.num_workers = default_num_workers()
    return images


def keep_labels(source: ImageSource, chosen: np.ndarray, how: str) -> PartlyLabelled:
    """Forget all labels but those of the ``chosen`` indices."""
    labels = np.full(len(source), -1, dtype=np.int64)
    labels[chosen] = source.labels[chosen]
    return PartlyLabelled(source, labels, list(source.classes), how, truth=source.labels)


# --- A user's own labels ----------------------------------------------------------------------------------------------


def from_class_folders(source: ImageSource) -> PartlyLabelled:
    """Class folders with an ``unlabeled/`` folder beside them."""
    folder = next(name for name in source.classes if name in UNLABELED_FOLDERS)
    classes = [name for name in source.classes if name != folder]
    if not classes:
        raise ValueError(f"{source.name} holds a folder {folder}/ but no class folders with labelled images")
    new = np.array([classes.index(name) if name != folder else -1 for name in source.classes])
    return PartlyLabelled(source, new[source.labels], classes, f"class folders beside {folder}/")


def from_tables(source: ImageSource, paths: Sequence[str], min_confidence: float | None = None) -> PartlyLabelled:
    """Labels of CSV files: a person's, with two columns, image and label, and pseudo-labels, which have more.

    Images are named as :func:`shared.images.tables.read_labels` says. Of the pseudo-labels those count that have a
    confidence of ``min_confidence`` or more; a label without one always counts.

    Raises:
        ValueError: If a table does not fit the images, or two labels of an image differ.
    """
    if not isinstance(source, FileSource):
        raise ValueError(f"--labels {' '.join(paths)}: {source.name} has no files that it could name")
    names = list(source.names)
    rows = [row for path in paths for row in read_labels(path, names, "in --data_path")]
    classes = sorted({row.label for row in rows})  # also those of which no label is certain enough: they will be missed
    how = " and ".join(paths)
    if min_confidence is not None:
        if all(row.confidence is None for row in rows):
            raise ValueError(f"--min_confidence {min_confidence}: --labels {how} has no column confidence")
        rows = [row for row in rows if row.confidence is None or row.confidence >= min_confidence]
        how += f" with --min_confidence {min_confidence}"
    labels = np.full(len(source), -1, dtype=np.int64)
    for row, label in label_of_each(rows).items():
        labels[row] = classes.index(label)
    return PartlyLabelled(source, labels, classes, how)


# --- Labelled data sets of which few labels are used ------------------------------------------------------------------


def find_list(subset_path: str, unlabeled_frac: float, data_seed: int | None, source: ImageSource) -> Path:
    """The list that ``--subset_path`` means: itself, or the official file for this share in a folder.

    ImageNet's lists are called after the share that is *not* labelled (``90percent.txt`` has 10 % of the images),
    CIFAR-10's ``spc.4000_split.<data_seed>.txt``.
    """
    path = Path(subset_path).expanduser()
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"--subset_path {subset_path}: no such file or folder")
        return path
    if isinstance(source, FileSource) and not source.name.startswith("cifar10"):
        name = f"{round(100 * unlabeled_frac)}percent.txt" if unlabeled_frac >= 0 else "val.txt"
    else:
        name = f"spc.4000_split.{152 if data_seed is None else data_seed}.txt"
        if round(unlabeled_frac, 6) != OFFICIAL_CIFAR_FRAC:
            raise ValueError(
                f"--unlabeled_frac {unlabeled_frac}: the official lists in {subset_path} are for {OFFICIAL_CIFAR_FRAC} "
                "(4000 labels); give a list of your own, or --labels_per_class"
            )
    if not (path / name).is_file():
        raise ValueError(f"--subset_path {subset_path} holds no {name}, the list for --unlabeled_frac {unlabeled_frac}")
    return path / name


def listed_indices(source: ImageSource, path: Path) -> np.ndarray:
    """Indices of the images of a list: of names where there are files, else of indices, as CIFAR-10's are."""
    where = f"--subset_path {path}"
    if isinstance(source, FileSource):
        return listed_images(source, str(path), "--subset_path")
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error
    wrong = [line for line in lines if not line.isdecimal() or int(line) >= len(source)]
    if wrong or not lines:
        what = f"{wrong[0]!r} is no index of an image" if wrong else "an empty list"
        raise ValueError(f"{where}: {what} of {source.name}")
    return np.unique([int(line) for line in lines])


def drawn_per_class(labels: np.ndarray, count: int, seed: int, classes: Sequence[str]) -> np.ndarray:
    """Indices of ``count`` images of every class."""
    if count < 1:
        raise ValueError(f"--labels_per_class {count} is less than 1")
    chosen = []
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if len(members) < count:
            raise ValueError(f"--labels_per_class {count}: class {name!r} has {len(members)} images")
        order = np.random.default_rng(derive_seed(seed, label)).permutation(members)
        chosen.append(order[:count])
    return np.sort(np.concatenate(chosen))


def drawn_by_share(count: int, unlabeled_frac: float) -> np.ndarray:
    """Indices of images that are kept with probability 1 - ``unlabeled_frac``, by a generator that is seeded with 0."""
    if not 0 <= unlabeled_frac < 1:
        raise ValueError(f"--unlabeled_frac {unlabeled_frac} is outside [0, 1)")
    keep = torch.rand(count, generator=torch.Generator().manual_seed(0)) >= unlabeled_frac
    return np.flatnonzero(keep.numpy())
