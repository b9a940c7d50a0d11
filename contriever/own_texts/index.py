"""An index of a folder of texts in one SQLite file: passages, vectors, and what is known of each file.

Every change is a transaction, so a kill at any instant leaves a good index. Of a large file the vectors are stored as
they are made, and wait for the rest: a kill loses at most the last 512.
"""

import contextlib
import hashlib
import os
import sqlite3
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..index.bm25 import BM25, combine
from ..text.files import first_difference
from ..text.words import phrases
from .folder import Limits, Piece, read_pieces
from .formats import missing_library
from .walk import describe_left_out, text_files

FORMAT = 2
PASSAGES_PER_TRANSACTION = 512
MOST_NAMES = 3  # of files with the same problem
_TABLES = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, sha256 BLOB, remark TEXT);
CREATE TABLE IF NOT EXISTS passages (
    path TEXT, number INTEGER, line INTEGER, title TEXT, text TEXT, vector BLOB, PRIMARY KEY (path, number)
);
CREATE TABLE IF NOT EXISTS waiting (sha256 BLOB PRIMARY KEY, vector BLOB); -- of texts of files that are not finished
"""


@dataclass
class Update:
    """What an update of the index has found."""

    new: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    embedded: int = 0
    size: int = 0  # bytes of the new and changed files
    done: float = 0.0  # bytes of them
    problems: dict[str, str] = field(default_factory=dict)  # file to reason
    left_out: Counter[str] = field(default_factory=Counter)  # by reason

    def describe(self) -> str:
        return (
            f"{self.new} new, {self.changed} changed, {self.removed} removed and {self.unchanged} unchanged files; "
            f"{self.embedded} passages embedded"
        )

    def remarks(self) -> list[str]:
        """What could not be read, equal reasons on one line, and what was left out."""
        names: dict[str, list[str]] = {}
        for name, problem in self.problems.items():
            names.setdefault(problem, []).append(name)
        told = [f"{', '.join(group[:MOST_NAMES])}{_others(group)}: {problem}" for problem, group in names.items()]
        return [*told, *filter(None, [describe_left_out(self.left_out)])]


def _others(names: list[str]) -> str:
    return f" and {len(names) - MOST_NAMES} others" if len(names) > MOST_NAMES else ""


@dataclass(frozen=True)
class Hit:
    """A passage that was found."""

    score: float
    path: str  # of its file, relative to the folder
    line: int  # where it begins there
    title: str
    text: str


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Turn what SQLite has to say into a ``ValueError`` that names the file."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise ValueError(f"the index {file} cannot be used: {error}; --index_path puts it elsewhere") from None
    except sqlite3.DatabaseError as error:
        raise ValueError(f"the index {file} is damaged: {error}; --rebuild makes it again") from None


@contextlib.contextmanager
def _telling(update: Update, name: str, known: dict[str, list]) -> Iterator[None]:
    """Note that a file cannot be read: it may have been removed in this moment, or belong to somebody else."""
    try:
        yield
    except OSError as error:
        state = "indexed as it was before, it cannot be read now" if name in known else "not indexed"
        update.problems[name] = f"{state}: {error.strerror}"


class SearchIndex:
    """The index of one folder, or of a single file.

    Args:
        file: The SQLite file.
        encode: From texts and their kind, ``query`` or ``passage``, to vectors (N, D) float32.
        settings: Whatever the vectors depend on; an index that was made with others is refused.
        limits: Of the passages.
        list_files: :func:`.walk.text_files` with the flags of the choice.
    """

    def __init__(
        self,
        root: Path,
        file: Path,
        encode: Callable[[list[str], str], np.ndarray],
        settings: dict[str, object],
        limits: Limits | None = None,
        list_files: Callable[..., Iterator[Path]] = text_files,
    ):
        self.list_files = list_files
        self.root, self.file, self.encode, self.limits = root, file, encode, limits or Limits()
        sizes = {"max_words": self.limits.max_words, "max_tokens": self.limits.max_tokens}
        self.settings = {name: str(value) for name, value in {**settings, "format": FORMAT, **sizes}.items()}
        with naming(file):
            self.database = sqlite3.connect(file, timeout=60, check_same_thread=False)
            self.database.executescript(_TABLES)
            self._check_settings()
        if file.stat().st_mode & 0o077:
            with contextlib.suppress(OSError):  # it may be somebody else's
                file.chmod(0o600)  # it holds the texts, which others may not be allowed to read
        self._loaded, self._loaded_version = None, None

    def _check_settings(self) -> None:
        found = dict(self.database.execute("SELECT name, value FROM settings"))
        if not found:
            with self.database:
                self.database.executemany("INSERT OR IGNORE INTO settings VALUES (?, ?)", self.settings.items())
            return
        if name := first_difference(self.settings, found):
            raise ValueError(
                f"the index {self.file} was made by another model or with other settings: its {name} is "
                f"{found.get(name)}, now it is {self.settings.get(name)}; --rebuild makes it again, --index_path "
                "keeps both"
            )

    def update(self, tell: Callable[[Update], object] = lambda update: None) -> Update:
        """Embed the files that are new or have changed, forget those that are gone.

        Args:
            tell: Called with what was done so far after every 512 passages.
        """
        with naming(self.file):
            return self._update(tell)

    def _update(self, tell: Callable[[Update], object]) -> Update:
        update, unreadable, todo = Update(), [], []
        known = {path: rest for path, *rest in self.database.execute("SELECT path, size, mtime_ns, sha256 FROM files")}
        places = {rest[2]: path for path, rest in known.items()}  # files may have been moved
        present = set()
        for path in self.list_files(self.root, unreadable.append, update.left_out):
            name = self._name(path, update)
            if name is None:
                continue
            present.add(name)
            with _telling(update, name, known):
                status = os.stat(path)
                if known.get(name, ())[:2] == [status.st_size, status.st_mtime_ns]:
                    update.unchanged += 1
                elif not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                    update.problems[name] = "not indexed: it is no regular file"
                elif missing_library(path):
                    update.left_out["documents"] += 1
                else:
                    update.size += status.st_size
                    todo.append((path, name, status))
        pending, count = [], 0
        for path, name, status in todo:
            file = None
            with _telling(update, name, known):
                file = self._read_if_changed(path, name, status, known.get(name), update)
            if file is not None:
                pending.append(file)
                count += max(1, len(file[-1]))
            if count >= PASSAGES_PER_TRANSACTION:
                self._store(pending, places, update, tell)
                pending, count = [], 0
        self._store(pending, places, update, tell)
        gone = known.keys() - present
        for error in unreadable:
            folder = Path(error.filename)
            update.problems[str(folder)] = f"cannot be listed: {error.strerror}; its texts stay as they were found last"
            gone = {name for name in gone if folder not in (self.root / name).parents}
        with self.database:
            for name in gone:
                self._forget(name)
                update.removed += 1
            if todo:
                self.database.execute("DELETE FROM waiting")  # of files that have changed meanwhile
        for name, remark in self.database.execute("SELECT path, remark FROM files WHERE remark IS NOT NULL"):
            update.problems[name] = remark
        update.left_out["problems"] = sum(p.startswith("not indexed") for p in update.problems.values())
        return update

    def _name(self, path: Path, update: Update) -> str | None:
        name = path.relative_to(self.root).as_posix() if path != self.root else path.name
        try:
            name.encode()
            return name
        except UnicodeEncodeError:
            update.problems[repr(name)] = "not indexed: its name is not UTF-8"
            return None

    def _read_if_changed(
        self, path: Path, name: str, status: os.stat_result, known: list | None, update: Update
    ) -> tuple | None:
        """(name, size, time, checksum, remark, pieces), or None when the content is the one that is known."""
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).digest()
        if known is not None and known[2] == sha256:  # only its time has changed
            with self.database:
                self.database.execute("UPDATE files SET mtime_ns = ? WHERE path = ?", (status.st_mtime_ns, name))
            update.unchanged += 1
            update.done += status.st_size
            return None
        try:
            pieces, remark = read_pieces(path, content, self.limits)
        except ValueError as error:
            pieces, remark = [], f"not indexed: {error}"
        if not pieces:
            remark = remark or "not indexed: it is empty"
        update.new += known is None
        update.changed += known is not None
        return name, status.st_size, status.st_mtime_ns, sha256, remark, pieces

    def _store(self, files: list[tuple], places: dict[bytes, str], update: Update, tell: Callable) -> None:
        """Embed the passages of some files, whose vectors wait until everything is written in one transaction."""
        vectors = {}
        for name, _, _, sha256, *_ in files:
            for place in {name, places.get(sha256, name)}:
                vectors |= self._known_vectors(place)
        hashes = {
            text: hashlib.sha256(text.encode()).digest()
            for text in dict.fromkeys(p.full_text() for *_, pieces in files for p in pieces)
            if text not in vectors
        }
        for text, sha256 in hashes.items():
            for (vector,) in self.database.execute("SELECT vector FROM waiting WHERE sha256 = ?", (sha256,)):
                vectors[text] = vector
        missing = [text for text in hashes if text not in vectors]
        done = update.done + sum(size for _, size, *_ in files)
        share = (done - update.done) / max(1, len(missing))
        for start in range(0, len(missing), PASSAGES_PER_TRANSACTION):
            part = missing[start : start + PASSAGES_PER_TRANSACTION]
            encoded = self.encode(part, "passage").astype(np.float16)
            if not np.isfinite(encoded).all():
                raise ValueError("the encoder gave vectors that are not finite: are its weights damaged?")
            vectors |= {text: vector.tobytes() for text, vector in zip(part, encoded, strict=True)}
            with self.database:
                rows = [(hashes[text], vectors[text]) for text in part]
                self.database.executemany("INSERT OR IGNORE INTO waiting VALUES (?, ?)", rows)
            update.embedded += len(part)
            update.done += share * len(part)
            tell(update)
        with self.database:
            self.database.executemany("DELETE FROM waiting WHERE sha256 = ?", [(h,) for h in hashes.values()])
            for name, size, mtime_ns, sha256, remark, pieces in files:
                self._forget(name)
                self.database.execute(
                    "INSERT INTO files VALUES (?, ?, ?, ?, ?)", (name, size, mtime_ns, sha256, remark)
                )
                self.database.executemany(
                    "INSERT INTO passages VALUES (?, ?, ?, ?, ?, ?)",
                    [(name, i, p.line, p.title, p.text, vectors[p.full_text()]) for i, p in enumerate(pieces)],
                )
        update.done = done

    def _known_vectors(self, name: str) -> dict[str, bytes]:
        """Vectors of the passages that a file had before, by text: most of a changed file stays."""
        rows = self.database.execute("SELECT title, text, vector FROM passages WHERE path = ?", (name,))
        return {Piece(0, title, text).full_text(): vector for title, text, vector in rows}

    def _forget(self, name: str) -> None:
        self.database.execute("DELETE FROM files WHERE path = ?", (name,))
        self.database.execute("DELETE FROM passages WHERE path = ?", (name,))

    def __len__(self) -> int:
        return self.database.execute("SELECT count(*) FROM passages").fetchone()[0]

    def _version(self) -> tuple[int, int]:
        """Differs after every change of the file, by this process or by another one."""
        return self.database.total_changes, self.database.execute("PRAGMA data_version").fetchone()[0]

    def rows(self) -> Iterator[tuple]:
        """(path, line, title, text, vector) of all passages, in the order of their places."""
        return self.database.execute("SELECT path, line, title, text, vector FROM passages ORDER BY path, number")

    def search(self, query: str, k: int, retriever: str = "dense", dense_weight: float = 0.5) -> list[Hit]:
        """The k best passages by the ``retriever``: ``dense``, ``bm25`` or ``hybrid``."""
        if not query.strip():
            raise ValueError("the query is empty")
        with naming(self.file):
            version = self._version()
            if version != self._loaded_version:
                self._loaded, self._loaded_version = _Loaded(list(self.rows())), version
        unit = self.settings.get("normalized") == "True"
        return self._loaded.search(query, k, self.encode, retriever, dense_weight, unit)


class _Loaded:
    """All passages in memory."""

    def __init__(self, rows: list[tuple]):
        self.passages = [row[:4] for row in rows]
        self.vectors = (
            np.stack([np.frombuffer(row[4], np.float16) for row in rows]).astype(np.float32) if rows else None
        )
        self.bm25 = None

    def search(
        self, query: str, k: int, encode: Callable, retriever: str, dense_weight: float, unit: bool
    ) -> list[Hit]:
        """Best first; with words in quotation marks only passages that hold them as they are."""
        if self.vectors is None:
            return []
        quoted = phrases(query)
        if self.bm25 is None and (quoted or retriever != "dense"):
            self.bm25 = BM25([f"{title} {text}" for _, _, title, text in self.passages])
        wanted = self.bm25.rows_with(quoted) if quoted else np.ones(len(self.vectors), bool)
        if retriever == "bm25":
            scores = self.bm25.scores(query)
            wanted &= scores > 0
        else:
            scores = encode([query], "query").astype(np.float32)[0] @ self.vectors.T
            if retriever == "hybrid":
                scores = combine(scores, self.bm25.scores(query), dense_weight, unit)
        rows = np.flatnonzero(wanted)
        order = rows[np.argsort(-scores[rows], kind="stable")[:k]]
        return [Hit(float(scores[row]), *self.passages[row]) for row in order]
