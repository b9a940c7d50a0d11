"""The pages of the search box, by ``page.html``. Texts are other people's: the template escapes what it is given."""

import base64
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlencode

import jinja2  # comes with torch
from markupsafe import Markup, escape

from .folder import marked, snippet, unit_of
from .index import Hit

LONGEST_QUERY = 2000  # characters
MOST_RESULTS = 100
MOST_PLACES = 20  # that are shown of a text that occurs more often
ARROW = " \u203a "
AROUND = 3  # passages before and after the one that is read
WAYS = {"dense": "Meaning", "bm25": "Words", "hybrid": "Both"}
# the cursor goes behind the query, which no attribute can say
SCRIPT = "{const q = document.forms[0].q; q.setSelectionRange(q.value.length, q.value.length)}"
SCRIPT_SOURCE = f"sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}"


@dataclass(frozen=True)
class Asked:
    """What is in the form."""

    query: str = ""
    retriever: str = "dense"
    k: int = 5
    default_k: int = 5

    def link(self, page: str = "/", /, **values: object) -> str:
        """The address of a page that keeps what was asked."""
        kept = {"q": self.query, "retriever": self.retriever}
        kept |= {"k": self.k} if self.k != self.default_k else {}
        return f"{page}?{urlencode(kept | values)}"


def headings(hit: Hit) -> list[str]:
    """The headings of a passage without the name of its file, which its path says."""
    words = hit.title.split(" > ") if hit.title else []
    return words[PurePosixPath(hit.path).stem.replace("_", " ") in words[:1] :]


def mark(text: str, query: str) -> Markup:
    """``text`` as HTML with the words of the query marked."""
    parts, done = [], 0
    for start, end in marked(text, query):
        parts += [escape(text[done:start]), Markup("<mark>{}</mark>").format(text[start:end])]
        done = end
    return Markup("").join([*parts, escape(text[done:])])


@functools.cache
def _template() -> jinja2.Template:
    how = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    how.globals |= {"headings": headings, "mark": mark, "snippet": snippet, "unit_of": unit_of}
    how.globals |= {"arrow": ARROW, "ways": WAYS, "script": SCRIPT, "longest": LONGEST_QUERY}
    how.globals |= {"most_places": MOST_PLACES, "most_results": MOST_RESULTS}
    return how.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def render_results(
    asked: Asked, hits: list[Hit] | None, count: int, problem: str = "", state: str = "", left_out: str = ""
) -> str:
    """The page of results.

    Args:
        hits: None before anything was asked.
        count: Of all passages.
        state: What is being indexed, or why it is not.
        left_out: Of the index; told before anything was asked.
    """
    told = {"problem": problem, "state": state, "left_out": left_out}
    title = f"{asked.query} - search" if asked.query else "Search"
    return _template().render(asked=asked, hits=hits, count=count, title=title, **told)


def render_passage(asked: Asked, passages: Sequence[Hit], number: int, around: int, count: int) -> str:
    """A passage with its neighbours: at most ``around`` before and after it, and one more where there are more."""
    shown = [hit for hit in passages if abs(hit.number - number) <= around]
    hit = next(hit for hit in shown if hit.number == number)
    more = {"has_earlier": shown[0] is not passages[0], "has_later": shown[-1] is not passages[-1]}
    page = {"passages": shown, "hit": hit, "around": around, "title": hit.path}
    return _template().render(asked=asked, count=count, **page, **more)
