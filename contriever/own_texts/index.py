"""An index of a folder of texts in one SQLite file: passages, vectors, and what is known of each file.

Every change is a transaction, so a kill at any instant leaves a good index. Vectors are stored as they are made, by the
hash of their text: a kill loses at most the last 512, and a text that has moved keeps its own.
"""

import contextlib
import functools
import hashlib
import os
import sqlite3
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..index.bm25 import JoinedTerms, combine
from ..text.files import first_difference
from ..text.words import contains, exact_words, phrases
from .folder import Limits, read_pieces, unit_of
from .formats import missing_library
from .walk import describe_left_out, text_files

FORMAT = 3
PASSAGES_PER_TRANSACTION = 512
MOST_NAMES = 3  # of files with the same problem
MOST_BYTES = 500_000_000  # of a file, for it is read as a whole
_TABLES = """
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, sha256 BLOB, remark TEXT);
CREATE TABLE IF NOT EXISTS passages (
    id INTEGER PRIMARY KEY, path TEXT, number INTEGER, line INTEGER, vector INTEGER NOT NULL, folded INTEGER
);
CREATE INDEX IF NOT EXISTS places ON passages (path, number);
CREATE INDEX IF NOT EXISTS equal_texts ON passages (folded);
CREATE TABLE IF NOT EXISTS texts (id INTEGER PRIMARY KEY, title TEXT, text TEXT, terms TEXT); -- of the passages
CREATE TABLE IF NOT EXISTS vectors (id INTEGER PRIMARY KEY, sha256 BLOB UNIQUE, vector BLOB); -- of title and text
"""
_NEW_PASSAGE = """
INSERT INTO passages (path, number, line, vector, folded)
VALUES (?, ?, ?, (SELECT id FROM vectors WHERE sha256 = ?), ?)
"""


@dataclass
class Update:
    """What an update of the index has found."""

    new: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    embedded: int = 0
    files: int = 0  # that are new or have changed
    files_done: int = 0
    size: int = 0  # their bytes
    done: float = 0.0
    began: float = field(default_factory=time.monotonic)
    problems: dict[str, str] = field(default_factory=dict)  # file to reason
    left_out: Counter[str] = field(default_factory=Counter)  # by reason
    kept: str = ""  # why everything stays as it was found last

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
        return [*told, *filter(None, [describe_left_out(self.left_out), self.kept])]

    def progress(self) -> str:
        """How far it is, and how long it will take."""
        text = f"{self.files_done:,} of {self.files:,} files, {self.done / max(1, self.size):.0%}"
        if not self.done:
            return text
        seconds = (time.monotonic() - self.began) * max(0.0, self.size / self.done - 1)
        unit, length = next(((unit, n) for unit, n in (("h", 3600), ("min", 60)) if seconds > 1.5 * n), ("s", 1))
        return f"{text}, about {seconds / length:.0f} {unit} left"


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
    number: int = 0  # within its file
    others: tuple[tuple[str, int, int], ...] = ()  # path, line and number of the same text elsewhere

    def record(self) -> dict:
        """What programs are told of it."""
        places = [{"path": path, "line": line} for path, line, _ in self.others]
        found = {"score": round(self.score, 6), "path": self.path, "line": self.line, "unit": unit_of(self.path)}
        return {**found, "title": self.title, "text": self.text, "others": places}


def answer(query: str, hits: list[Hit], left_out: Counter[str], state: str = "") -> dict:
    """The answer to programs: the hits, what is left out of the index by reason, and what is still being indexed."""
    return {"query": query, "results": [hit.record() for hit in hits], "left_out": dict(+left_out), "state": state}


def folded(text: str) -> int:
    """A number that is the same for texts that differ in case and blanks alone."""
    content = " ".join(text.casefold().split()).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


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
    """The index of one folder, or of a single file. One thread may update it while others search.

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
        with contextlib.suppress(OSError):  # it may be somebody else's, or on a disk that only can be read
            os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))  # others may not be allowed to read the texts
            file.chmod(0o600)  # as SQLite's journal will be
        with naming(file):
            self.database = sqlite3.connect(file, timeout=60, check_same_thread=False)
            self.database.execute("PRAGMA cache_spill = OFF")  # large changes lock others out at their end only
            self._check_settings()
            self._reader = sqlite3.connect(file, timeout=60, check_same_thread=False, isolation_level=None)
        self._lock = threading.Lock()  # of the reader
        self._loaded, self._loaded_version = None, None

    def _check_settings(self) -> None:
        self.database.execute("CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT)")
        found = dict(self.database.execute("SELECT name, value FROM settings"))
        if not found:
            self.database.executescript(_TABLES)
            with self.database:
                self.database.executemany("INSERT OR IGNORE INTO settings VALUES (?, ?)", self.settings.items())
            return
        if name := first_difference(self.settings, found):
            raise ValueError(
                f"the index {self.file} was made by another model or with other settings: its {name} is "
                f"{found.get(name)}, now it is {self.settings.get(name)}; --rebuild makes it again, --index_path "
                "keeps both"
            )

    def update(self, tell: Callable[[Update], object] = lambda update: None, drop_missing: bool = False) -> Update:
        """Embed the files that are new or have changed, forget those that are gone.

        An index that cannot be written stays as it is, which ``kept`` tells; ``ValueError`` if it is empty.

        Args:
            tell: Called with what was done so far, at first and at least after every 512 passages.
            drop_missing: Also forget the files if none is left at all; else the disk may just not be there.
        """
        update = Update()
        with naming(self.file):
            try:
                self._update(update, tell, drop_missing)
            except sqlite3.OperationalError as error:
                if not len(self):
                    raise
                update.kept = f"{self.file} cannot be written and is searched as it is: {error}"
        return update

    def _update(self, update: Update, tell: Callable[[Update], object], drop_missing: bool) -> None:
        unreadable, todo = [], []
        known = {path: rest for path, *rest in self.database.execute("SELECT path, size, mtime_ns, sha256 FROM files")}
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
                elif status.st_size > MOST_BYTES:
                    size = f"{status.st_size / 1e9:,.1f} GB, and more than {MOST_BYTES / 1e9} are not read"
                    update.problems[name] = f"not indexed: it has {size}"
                else:
                    update.size += status.st_size
                    todo.append((path, name, status))
        gone = known.keys() - present
        for error in unreadable:
            folder = Path(error.filename)
            update.problems[str(folder)] = f"cannot be listed: {error.strerror}; its texts stay as they were found last"
            gone = {name for name in gone if folder not in (self.root / name).parents}
        if gone and not present and not drop_missing:
            update.kept = (
                f"{self.root} holds no text, is its disk there? {len(gone)} files stay as they were found last; "
                "--drop_missing forgets them"
            )
            gone = set()
        update.files = len(todo)
        if todo or gone:
            self.database.execute(f"PRAGMA user_version = {FORMAT}")  # fails before anything is embedded in vain
            tell(update)
        self._read_and_store(todo, known, update, tell)
        with self.database:
            for name in gone:
                self._forget(name)
                update.removed += 1
            if todo or gone:
                self.database.execute("DELETE FROM vectors WHERE id NOT IN (SELECT vector FROM passages)")
        for name, remark in self.database.execute("SELECT path, remark FROM files WHERE remark IS NOT NULL"):
            update.problems[name] = remark
        update.left_out["problems"] = sum(p.startswith("not indexed") for p in update.problems.values())

    def _name(self, path: Path, update: Update) -> str | None:
        start = len(str(self.root / "_")) - 1  # slices take a fifth of the time of relative paths
        name = path.name if path == self.root else str(path)[start:].replace(os.sep, "/")
        try:
            name.encode()
            return name
        except UnicodeEncodeError:
            update.problems[repr(name)] = "not indexed: its name is not UTF-8"
            return None

    def _read_and_store(self, todo: list[tuple], known: dict[str, list], update: Update, tell: Callable) -> None:
        pending, count = [], 0
        for path, name, status in todo:
            file = None
            with _telling(update, name, known):
                file = self._read_if_changed(path, name, status, known.get(name), update)
            if file is not None:
                pending.append(file)
                count += max(1, len(file[-1]))
            if count >= PASSAGES_PER_TRANSACTION:
                self._store(pending, update, tell)
                pending, count = [], 0
        if pending:
            self._store(pending, update, tell)

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
            update.files_done += 1
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

    def _store(self, files: list[tuple], update: Update, tell: Callable) -> None:
        """Embed the texts of some files that have no vector, then write all of their passages in one transaction."""
        hashes = [[hashlib.sha256(piece.full_text().encode()).digest() for piece in pieces] for *_, pieces in files]
        texts = {
            sha256: piece
            for file, row in zip(files, hashes, strict=True)
            for sha256, piece in zip(row, file[-1], strict=True)
        }
        has_vector = "SELECT EXISTS (SELECT * FROM vectors WHERE sha256 = ?)"
        missing = [sha256 for sha256 in texts if not self.database.execute(has_vector, (sha256,)).fetchone()[0]]
        done = update.done + sum(size for _, size, *_ in files)
        share = (done - update.done) / max(1, len(missing))
        for start in range(0, len(missing), PASSAGES_PER_TRANSACTION):
            part = missing[start : start + PASSAGES_PER_TRANSACTION]
            encoded = self.encode([texts[sha256].full_text() for sha256 in part], "passage").astype(np.float16)
            if not np.isfinite(encoded).all():
                raise ValueError("the encoder gave vectors that are not finite: are its weights damaged?")
            with self.database:
                rows = [(sha256, vector.tobytes()) for sha256, vector in zip(part, encoded, strict=True)]
                self.database.executemany("INSERT OR IGNORE INTO vectors (sha256, vector) VALUES (?, ?)", rows)
            update.embedded += len(part)
            update.done += share * len(part)
            tell(update)
        terms = [[JoinedTerms.join(f"{piece.title} {piece.text}") for piece in pieces] for *_, pieces in files]
        with self.database:
            for (name, size, mtime_ns, sha256, remark, pieces), row, joined in zip(files, hashes, terms, strict=True):
                self._forget(name)
                self.database.execute(
                    "INSERT INTO files VALUES (?, ?, ?, ?, ?)", (name, size, mtime_ns, sha256, remark)
                )
                for number, (piece, of_text, words) in enumerate(zip(pieces, row, joined, strict=True)):
                    place = name, number, piece.line, of_text, folded(piece.text or piece.title)
                    passage_id = self.database.execute(_NEW_PASSAGE, place).lastrowid
                    content = passage_id, piece.title, piece.text, words
                    self.database.execute("INSERT INTO texts VALUES (?, ?, ?, ?)", content)
        update.done = done
        update.files_done += len(files)
        tell(update)

    def _forget(self, name: str) -> None:
        self.database.execute("DELETE FROM files WHERE path = ?", (name,))
        self.database.execute("DELETE FROM texts WHERE id IN (SELECT id FROM passages WHERE path = ?)", (name,))
        self.database.execute("DELETE FROM passages WHERE path = ?", (name,))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """The index as it is at one instant."""
        with naming(self.file), self._lock:
            try:
                self._reader.execute("BEGIN")
                yield self._reader
            finally:
                self._reader.rollback()

    def __len__(self) -> int:
        with self._reading() as reader:
            return reader.execute("SELECT count(*) FROM passages").fetchone()[0]

    def passages(self, path: str, first: int, last: int) -> list[Hit]:
        """Those of a file, from one number to another."""
        command = "SELECT 0.0, path, line, title, text, number FROM passages JOIN texts USING (id) WHERE path = ? "
        with self._reading() as reader:
            rows = reader.execute(f"{command} AND number BETWEEN ? AND ? ORDER BY number", (path, first, last))
            return [Hit(*row) for row in rows]

    def search(self, query: str, k: int, retriever: str = "dense", dense_weight: float = 0.5) -> list[Hit]:
        """The k best texts by the ``retriever``: ``dense``, ``bm25`` or ``hybrid``."""
        if not query.strip():
            raise ValueError("the query is empty")
        vector = None if retriever == "bm25" else self.encode([query], "query")[0]
        unit = self.settings.get("normalized") == "True"
        with self._reading() as reader:
            version = reader.execute("PRAGMA data_version").fetchone()  # differs after every change
            if version != self._loaded_version:
                self._loaded, self._loaded_version = _Loaded(reader), version
            return self._loaded.search(query, vector, k, retriever, dense_weight, unit)


class _Loaded:
    """What queries are compared with, in memory; rows are passages in the order of their places."""

    def __init__(self, reader: sqlite3.Connection):
        self.reader = reader
        places = reader.execute("SELECT id, vector, folded FROM passages ORDER BY path, number").fetchall()
        self.ids = [id for id, *_ in places]
        self.folded = [text for *_, text in places]
        stored = reader.execute("SELECT id, vector FROM vectors ORDER BY id").fetchall()
        self.vectors = np.frombuffer(b"".join(vector for _, vector in stored), np.float16).astype(np.float32)
        self.vectors = self.vectors.reshape(len(stored), -1) if stored else self.vectors
        self.vector_of = np.searchsorted([id for id, _ in stored], [vector for _, vector, _ in places])

    @functools.cached_property
    def terms(self) -> JoinedTerms:
        rows = self.reader.execute("SELECT terms FROM passages JOIN texts USING (id) ORDER BY path, number")
        return JoinedTerms([terms for (terms,) in rows])

    def hit(self, row: int, score: float) -> Hit:
        command = "SELECT path, line, title, text, number FROM passages JOIN texts USING (id) WHERE id = ?"
        return Hit(score, *self.reader.execute(command, (self.ids[row],)).fetchone())

    def others(self, row: int) -> tuple[tuple[str, int, int], ...]:
        """Further places of the same text."""
        command = "SELECT path, line, number FROM passages WHERE folded = ? AND id != ? ORDER BY path, number"
        return tuple(self.reader.execute(command, (self.folded[row], self.ids[row])))

    def holds(self, row: int, quoted: list[list[str]]) -> bool:
        hit = self.hit(row, 0.0)
        words = exact_words(f"{hit.title} {hit.text}")
        return all(contains(words, phrase) for phrase in quoted)

    def search(
        self, query: str, vector: np.ndarray | None, k: int, retriever: str, dense_weight: float, unit: bool
    ) -> list[Hit]:
        """Best first; with words in quotation marks only passages that hold them as they are."""
        if not self.ids:
            return []
        wanted = np.ones(len(self.ids), bool)
        if quoted := phrases(query):
            wanted = self.terms.with_words({word for phrase in quoted for word in phrase})
            wanted[wanted] = [self.holds(row, quoted) for row in np.flatnonzero(wanted).tolist()]
        if retriever == "bm25":
            scores, _ = self.terms.scores(query)
            wanted &= scores > 0
        else:
            scores = (self.vectors @ vector)[self.vector_of]
            if retriever == "hybrid":
                lexical, focus = self.terms.scores(query)
                scores = combine(scores, lexical, dense_weight, unit, focus)
        rows = np.flatnonzero(wanted)
        best: dict[int, int] = {}  # texts to the best rows of each
        for row in rows[np.argsort(-scores[rows], kind="stable")].tolist():
            best.setdefault(self.folded[row], row)
            if len(best) == k:
                break
        return [replace(self.hit(row, float(scores[row])), others=self.others(row)) for row in best.values()]
