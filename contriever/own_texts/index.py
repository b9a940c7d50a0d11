"""An index of a folder of texts in one SQLite file: passages, vectors, and what is known of each file.

Every change is a transaction, so a kill at any instant leaves a good index; files that were not reached are embedded
next time.
"""

import contextlib
import hashlib
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..index.bm25 import BM25, combine
from ..text.files import first_difference
from ..text.words import phrases
from .folder import Limits, Piece, read_pieces, text_files

FORMAT = 2
PASSAGES_PER_TRANSACTION = 512
_TABLES = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, sha256 BLOB, remark TEXT);
CREATE TABLE IF NOT EXISTS passages (
    path TEXT, number INTEGER, line INTEGER, title TEXT, text TEXT, vector BLOB, PRIMARY KEY (path, number)
);
"""


@dataclass
class Update:
    """What an update of the index has found."""

    new: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    embedded: int = 0
    problems: dict[str, str] = field(default_factory=dict)  # file to reason

    def describe(self) -> str:
        return (
            f"{self.new} new, {self.changed} changed, {self.removed} removed and {self.unchanged} unchanged files; "
            f"{self.embedded} passages embedded"
        )


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


class SearchIndex:
    """The index of one folder, or of a single file.

    Args:
        file: The SQLite file.
        encode: From texts and their kind, ``query`` or ``passage``, to vectors (N, D) float32.
        settings: Whatever the vectors depend on; an index that was made with others is refused.
        limits: Of the passages.
    """

    def __init__(
        self,
        root: Path,
        file: Path,
        encode: Callable[[list[str], str], np.ndarray],
        settings: dict[str, object],
        limits: Limits | None = None,
    ):
        self.root, self.file, self.encode, self.limits = root, file, encode, limits or Limits()
        sizes = {"max_words": self.limits.max_words, "max_tokens": self.limits.max_tokens}
        self.settings = {name: str(value) for name, value in {**settings, "format": FORMAT, **sizes}.items()}
        is_new = not file.exists()
        with naming(file):
            self.database = sqlite3.connect(file, timeout=60, check_same_thread=False)
            self.database.executescript(_TABLES)
            if is_new:
                file.chmod(0o600)  # it will hold the texts, which others may not be allowed to read
            self._check_settings()
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

    def update(self) -> Update:
        """Embed the files that are new or have changed, forget those that are gone."""
        with naming(self.file):
            return self._update()

    def _update(self) -> Update:
        update, pending, unreadable = Update(), [], []
        known = {path: rest for path, *rest in self.database.execute("SELECT path, size, mtime_ns, sha256 FROM files")}
        present = set()
        for path in text_files(self.root, unreadable.append):
            name = self._name(path, update)
            if name is None:
                continue
            present.add(name)
            changed = self._read_if_changed(path, name, known.get(name), update)
            if changed is not None:
                pending.append(changed)
                if sum(len(pieces) for *_, pieces in pending) >= PASSAGES_PER_TRANSACTION:
                    self._store(pending, update)
                    pending = []
        self._store(pending, update)
        gone = known.keys() - present
        for error in unreadable:
            folder = Path(error.filename)
            update.problems[str(folder)] = f"cannot be listed: {error.strerror}; its texts stay as they were found last"
            gone = {name for name in gone if folder not in (self.root / name).parents}
        with self.database:
            for name in gone:
                self._forget(name)
                update.removed += 1
        for name, remark in self.database.execute("SELECT path, remark FROM files WHERE remark IS NOT NULL"):
            update.problems[name] = remark
        return update

    def _name(self, path: Path, update: Update) -> str | None:
        name = path.relative_to(self.root).as_posix() if path != self.root else path.name
        try:
            name.encode()
            return name
        except UnicodeEncodeError:
            update.problems[repr(name)] = "not indexed: its name is not UTF-8"
            return None

    def _read_if_changed(self, path: Path, name: str, known: list | None, update: Update) -> tuple | None:
        """(name, size, time, checksum, remark, pieces), or None when the file is the one that is known."""
        try:
            status = os.stat(path)
            if known is not None and known[:2] == [status.st_size, status.st_mtime_ns]:
                update.unchanged += 1
                return None
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                update.problems[name] = "not indexed: it is no regular file"
                return None
            content = path.read_bytes()
        except OSError as error:  # it may have been removed in this moment, or belong to somebody else
            state = "not indexed" if known is None else "indexed as it was before, it cannot be read now"
            update.problems[name] = f"{state}: {error.strerror}"
            return None
        sha256 = hashlib.sha256(content).digest()
        if known is not None and known[2] == sha256:  # only its time has changed
            with self.database:
                self.database.execute("UPDATE files SET mtime_ns = ? WHERE path = ?", (status.st_mtime_ns, name))
            update.unchanged += 1
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

    def _store(self, files: list[tuple], update: Update) -> None:
        """Embed the passages of some files and write everything in one transaction."""
        vectors = self._known_vectors([name for name, *_ in files])
        missing = dict.fromkeys(p.full_text() for *_, pieces in files for p in pieces if p.full_text() not in vectors)
        if missing:
            encoded = self.encode(list(missing), "passage").astype(np.float16)
            if not np.isfinite(encoded).all():
                raise ValueError("the encoder gave vectors that are not finite: are its weights damaged?")
            vectors |= {text: vector.tobytes() for text, vector in zip(missing, encoded, strict=True)}
        with self.database:
            for name, size, mtime_ns, sha256, remark, pieces in files:
                self._forget(name)
                self.database.execute(
                    "INSERT INTO files VALUES (?, ?, ?, ?, ?)", (name, size, mtime_ns, sha256, remark)
                )
                self.database.executemany(
                    "INSERT INTO passages VALUES (?, ?, ?, ?, ?, ?)",
                    [(name, i, p.line, p.title, p.text, vectors[p.full_text()]) for i, p in enumerate(pieces)],
                )
        update.embedded += len(missing)

    def _known_vectors(self, names: list[str]) -> dict[str, bytes]:
        """Vectors of the passages that these files had before, by text: most of a changed file stays."""
        return {
            Piece(0, title, text).full_text(): vector
            for name in names
            for title, text, vector in self.database.execute(
                "SELECT title, text, vector FROM passages WHERE path = ?", (name,)
            )
        }

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
