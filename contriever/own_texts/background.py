"""An index that is searched while a thread brings it up to date."""

import threading
import time
from collections import Counter
from collections.abc import Callable

from .index import Hit, SearchIndex, Update

SECONDS_BETWEEN_UPDATES = 5
SECONDS_TO_WAIT = 1.0  # for small changes, and for the encoder


class NotReady(ValueError):
    """There is no index to search yet; the message says why."""


class LiveIndex(threading.Thread):
    """Opens an index and brings it up to date: at first, and after queries, at most every few seconds.

    Args:
        open_index: Takes as long as the encoder takes to load.
        first_update: Takes the index and a function that is told how far it is.

    Attributes:
        state: What it is doing, for the reader of a page; empty where all is indexed.
        left_out: Of the last update, by reason.
        on_end: Called when there is nothing to search, with the reason in ``error``.
    """

    def __init__(
        self,
        open_index: Callable[[], SearchIndex],
        first_update: Callable[[SearchIndex, Callable[[Update], object]], Update] = SearchIndex.update,
    ):
        super().__init__(daemon=True)
        self.state, self.on_end = "the encoder is being loaded", lambda: None
        self.error: ValueError | OSError | None = None
        self.left_out: Counter[str] = Counter()
        self._open, self._first_update = open_index, first_update
        self._index: SearchIndex | None = None
        self._opened, self._wanted, self._quiet = threading.Event(), threading.Event(), threading.Event()
        self._updated = 0.0

    def run(self) -> None:
        try:
            self._index = self._open()
            self.state = "looking for new texts"
            self._opened.set()
            self._bring_up_to_date(self._first_update)
            while True:
                self._wanted.wait()
                self._wanted.clear()
                self._bring_up_to_date(SearchIndex.update)
        except (ValueError, OSError) as error:  # for whoever waits for the thread
            self.error = error
        finally:
            self.on_end()

    def _bring_up_to_date(self, update: Callable) -> None:
        try:
            found = update(self._index, self._tell)
            self.left_out = found.left_out
            self.state = found.kept
        except (ValueError, OSError) as error:  # the folder may be away for a while: what was found last is searched
            if not len(self._index):
                raise
            self.state = f"{error}; texts are searched as they were found last"
        self._updated = time.monotonic()
        self._quiet.set()

    def _tell(self, update: Update) -> None:
        self.state = f"indexing: {update.progress()}"

    def search(self, query: str, k: int, retriever: str, dense_weight: float) -> list[Hit]:
        """What is there already; small changes of the folder are waited for."""
        index = self._ready()
        if self._quiet.is_set() and time.monotonic() - self._updated > SECONDS_BETWEEN_UPDATES:
            self._quiet.clear()
            self._wanted.set()
            self._quiet.wait(SECONDS_TO_WAIT)
        return index.search(query, k, retriever, dense_weight)

    def wait(self, seconds: float) -> None:
        """Until everything that was asked for is indexed, but no longer."""
        self._quiet.wait(seconds)

    def passages(self, path: str, first: int, last: int) -> list[Hit]:
        return self._ready().passages(path, first, last)

    def _ready(self) -> SearchIndex:
        if not self._opened.wait(SECONDS_TO_WAIT):
            raise self.error or NotReady(self.state)
        return self._index

    def __len__(self) -> int:
        return len(self._index) if self._opened.is_set() else 0
