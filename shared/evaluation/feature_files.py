"""Files of features: for every image its path, its label if there is one, and its embedding.

==============  ====================================================================================================
``.parquet``    columns ``path``, ``label``, ``embedding`` (float32), as pandas and viewers of embeddings open them
``.npz``        arrays of these names
``.npy``        the embeddings; ``<name>.paths.txt`` beside it has a line per image, and after a tab its label
``.csv``        columns ``path``, ``label``, ``embedding_0``, ``embedding_1``, ...
==============  ====================================================================================================

Beside each of them ``<name>.json`` says which network and layer it was, so that features of two are not mixed.
"""

import csv
import importlib.util
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shared.run.files import atomic_file

SUFFIXES = (".parquet", ".npz", ".npy", ".csv")


class Features(NamedTuple):
    """Images in one order: paths, the names of their classes (or None), embeddings (N, D) in float32, their network."""

    paths: list[str]
    labels: list[str] | None
    embeddings: np.ndarray
    made_by: dict | None = None


def check_suffix(path: Path, flag: str) -> None:
    """Refuse what is no file of features, by its name, before anything is computed."""
    if path.suffix not in SUFFIXES or path.is_dir():
        raise ValueError(f"{flag} {path}: not a file that ends in {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{flag} {path}: needs pyarrow (pip install -e '.[features]'); .npz, .npy and .csv do not")


def write_features(path: Path, features: Features) -> None:
    """Write a file that appears only when it is complete; names that are no UTF-8 are escaped in ``.parquet``."""
    columns = {"path": features.paths} | ({} if features.labels is None else {"label": features.labels})
    embeddings = np.ascontiguousarray(features.embeddings, dtype=np.float32)
    text = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    path.with_name(f"{path.name}.json").unlink(missing_ok=True)  # of the file that is replaced
    if features.made_by is not None:
        with atomic_file(path.with_name(f"{path.name}.json")) as temporary:
            temporary.write_text(json.dumps(features.made_by, indent=1) + "\n")
    if path.suffix == ".npy":
        with atomic_file(path.with_suffix(".paths.txt")) as temporary, open(temporary, "w", **text) as file:
            lines = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
            lines.writerows(zip(*columns.values(), strict=True))
    with atomic_file(path) as temporary:
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet

            table = {name: [_utf8(text) for text in values] for name, values in columns.items()}
            lists = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
            pyarrow.parquet.write_table(pa.table(table | {"embedding": lists}), temporary)
        elif path.suffix == ".npz":
            np.savez(temporary, embedding=embeddings, **{name: np.array(texts) for name, texts in columns.items()})
        elif path.suffix == ".npy":
            np.save(temporary, embeddings)
        else:
            with open(temporary, "w", **text) as file:
                lines = csv.writer(file)
                lines.writerow([*columns, *(f"embedding_{i}" for i in range(embeddings.shape[1]))])
                lines.writerows(
                    [*texts, *map(str, row)] for *texts, row in zip(*columns.values(), embeddings, strict=True)
                )


def read_features(path: Path) -> Features:
    """What :func:`write_features` wrote.

    Raises:
        ValueError: If it is no such file, holds no images, or embeddings that differ in dimension or are not finite.
    """
    check_suffix(path, "features")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; extract_features writes one")
    try:
        columns, embeddings = _READERS[path.suffix](path)
        embeddings = np.asarray(embeddings, dtype=np.float32)
        paths = [str(name) for name in columns["path"]]
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, csv.Error) as error:  # pyarrow's: ValueError
        raise ValueError(f"{path} holds no features (path, label, embedding; all of one dimension): {error}") from error
    if embeddings.ndim != 2 or len(embeddings) != len(paths) or not embeddings.size:
        raise ValueError(f"{path}: {len(paths)} paths and embeddings of shape {embeddings.shape}, expected (N, D)")
    if not np.isfinite(embeddings).all() or not embeddings.any(axis=1).all():
        raise ValueError(f"{path}: some embeddings are not finite, or all zeros")
    labels = [str(name) for name in columns["label"]] if "label" in columns else None
    said = path.with_name(f"{path.name}.json")
    try:
        made_by = json.loads(said.read_text()) if said.is_file() else None
    except ValueError as error:
        raise ValueError(f"{said}: {error}; remove it, and nothing is known of the network") from error
    if not isinstance(made_by, dict | None):
        raise ValueError(f"{said} says nothing about a network; remove it")
    return Features(paths, labels, embeddings, made_by)


def read_all(files: Sequence[str]) -> Features:
    """The images of all files in one, their embeddings scaled to unit length; labels if every file has them.

    Raises:
        ValueError: If a file holds no features, or they differ in dimension.
    """
    parts = [read_features(Path(file)) for file in files]
    for file, part in zip(files, parts, strict=True):
        for name in ("weights_crc32", "layer", "token", "image_size") if part.made_by and parts[0].made_by else ():
            if (this := part.made_by.get(name)) != (other := parts[0].made_by.get(name)):
                raise ValueError(f"{file} has {name} {this}, {files[0]} {other}: features of different networks")
        if (dim := part.embeddings.shape[1]) != (first := parts[0].embeddings.shape[1]):
            raise ValueError(f"{file} has {dim} dimensions, {files[0]} {first}: features of different networks")
    labels = None if any(part.labels is None for part in parts) else [name for part in parts for name in part.labels]
    embeddings = np.concatenate([part.embeddings for part in parts])
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return Features([path for part in parts for path in part.paths], labels, embeddings)


def _utf8(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _read_parquet(path: Path) -> tuple[dict, np.ndarray]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    columns = {name: table.column(name).to_pylist() for name in table.column_names if name in ("path", "label")}
    values = table.column("embedding").combine_chunks()
    return columns, values.flatten().to_numpy().reshape(len(values), -1)


def _read_npz(path: Path) -> tuple[dict, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays), arrays["embedding"]


def _read_rows(path: Path, delimiter: str) -> tuple[tuple[str, ...], ...]:
    """Columns of a table of texts."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return tuple(zip(*csv.reader(file, delimiter=delimiter), strict=True))


def _read_npy(path: Path) -> tuple[dict, np.ndarray]:
    columns = _read_rows(path.with_suffix(".paths.txt"), "\t")
    return dict(zip(("path", "label"), columns, strict=False)), np.load(path)


def _read_csv(path: Path) -> tuple[dict, np.ndarray]:
    columns = {name: values for name, *values in _read_rows(path, ",")}
    numbers = [values for name, values in columns.items() if name.startswith("embedding_")]
    return columns, np.array(numbers, dtype=np.float32).T


_READERS = {".parquet": _read_parquet, ".npz": _read_npz, ".npy": _read_npy, ".csv": _read_csv}
