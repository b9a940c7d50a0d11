"""The pages of the search box as HTML. Texts are other people's: whatever is not written here is escaped."""

import base64
import hashlib
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlencode

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
STYLE = """
:root { color-scheme: light dark; --paper: #fdfcfa; --ink: #1d1c1a; --quiet: #68655f; --line: #dcd9d2; --link: #174ea6;
  --mark: #ffefa6; --raised: #f4f2ed }
@media (prefers-color-scheme: dark) { :root { --paper: #191816; --ink: #e6e3dd; --quiet: #a09c94; --line: #3b3935;
  --link: #9dbdf7; --mark: #5d4a06; --raised: #23211e } }
* { box-sizing: border-box }
body { font: 1rem/1.55 system-ui, sans-serif; max-width: 44rem; margin: 0 auto; padding: 1.25rem 1rem 3rem;
  background: var(--paper); color: var(--ink); overflow-wrap: anywhere }
a { color: var(--link); text-decoration: none }
a:hover { text-decoration: underline }
h1, h2, p, ol, ul, form { margin: 0; padding: 0 }
h1, h2 { font-size: 1.05rem; line-height: 1.35; font-weight: 600 }
input, button { font: inherit; color: inherit; border: 1px solid var(--line); border-radius: .5rem; background: none }
input { flex: 1; min-width: 0; padding: .5rem .75rem; background: var(--raised); border-color: var(--quiet) }
button { padding: .5rem .9rem; cursor: pointer }
button:hover { background: var(--raised) }
:focus-visible { outline: 2px solid var(--link); outline-offset: 1px }
.row { display: flex; gap: .5rem }
.ways { display: flex; flex-wrap: wrap; gap: .15rem; margin: .5rem 0 0 -.6rem }
.ways button { padding: .15rem .6rem; border: 0; font-size: .9rem; color: var(--quiet) }
.ways [aria-pressed=true] { color: var(--ink); font-weight: 600; background: var(--raised) }
ol, ul { list-style: none }
li { margin: 1.6rem 0 }
.place, .note, summary, li li { font-size: .875rem; color: var(--quiet) }
.place { margin: .1rem 0; text-align: -webkit-match-parent; text-align: match-parent }
li li { margin: .15rem 0 }
details { margin-top: .1rem }
summary { cursor: pointer }
mark { background: var(--mark); color: inherit; border-radius: .15rem }
nav, .note, h1 { margin: 1.4rem 0 }
[role=alert] { color: var(--ink) }
section { padding: .7rem 0; padding-inline-start: .9rem; border-inline-start: 3px solid transparent }
.hit { border-color: var(--link); background: var(--raised); padding-inline-end: .9rem; scroll-margin-top: 25vh }
.text { white-space: pre-wrap; tab-size: 4; unicode-bidi: plaintext }
.code { font-family: ui-monospace, monospace; font-size: .9rem }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<form action="/" method="get" role="search">
<div class="row"><input type="search" name="q" value="{query}" dir="auto" aria-label="Search" maxlength="{longest}"
  placeholder="Search {count} passages" autocomplete="off" autocapitalize="off" enterkeyhint="search"{focus}>
<button name="retriever" value="{retriever}">Search</button></div>
<div class="ways" role="group" aria-label="Search by">{ways}</div>{hidden}
</form>
<script>{script}</script>
<main>
{main}</main>
</body>
</html>
"""


@dataclass(frozen=True)
class Asked:
    """What is in the form."""

    query: str = ""
    retriever: str = "dense"
    k: int = 5
    default_k: int = 5

    def link(self, page: str = "/", /, **values: object) -> str:
        """The address of a page that keeps what was asked, escaped."""
        kept = {"q": self.query, "retriever": self.retriever}
        kept |= {"k": self.k} if self.k != self.default_k else {}
        return html.escape(f"{page}?{urlencode(kept | values)}")


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
    parts = [f'<p class="note" role="status">{html.escape(state)}</p>\n'] if state else []
    if problem:
        parts.append(f'<p class="note" role="alert">{html.escape(problem)}</p>\n')
    elif hits is None:
        parts.append('<p class="note">“Words in quotation marks” must occur as they are.</p>\n')
        parts += [f'<p class="note">{html.escape(left_out)}</p>\n'] if left_out else []
    elif hits:
        parts += ["<ol>\n", *(_result(hit, asked) for hit in hits), "</ol>\n"]
        if len(hits) == asked.k < MOST_RESULTS:
            more = asked.link(k=min(2 * asked.k, MOST_RESULTS))
            parts.append(f'<nav><a href="{more}">More results</a></nav>\n')
    else:
        parts.append('<p class="note">Nothing found.</p>\n')
    return _page(asked, "".join(parts), count, focus=True)


def render_passage(asked: Asked, passages: Sequence[Hit], number: int, around: int, count: int) -> str:
    """A passage with its neighbours: at most ``around`` before and after it, and one more where there are more."""
    shown = [hit for hit in passages if abs(hit.number - number) <= around]
    hit = next(hit for hit in shown if hit.number == number)
    wider = asked.link("/passage", path=hit.path, number=number, around=4 * around) + "#hit"
    back = f'<nav><a href="{asked.link()}">Back to the results</a></nav>\n' if asked.query else ""
    parts = [f'{back}<h1 dir="ltr">{html.escape(hit.path)}</h1>\n']
    if shown[0] is not passages[0]:
        parts.append(f'<nav><a href="{wider}">Earlier passages</a></nav>\n')
    above = None
    for passage in shown:
        headings = ARROW.join(_headings(passage))
        title = f"<h2>{html.escape(headings)}</h2>" if headings not in ("", above) else ""
        above = headings
        mine = ' class="hit" id="hit"' if passage.number == number else ""
        kind = "text code" if passage.path.endswith(".py") else "text"
        text = mark(passage.text, asked.query)
        place = f'<p class="place" dir="ltr">{unit_of(passage.path)} {passage.line}</p>'
        parts.append(f'<section{mine} dir="auto">{title}{place}<div class="{kind}">{text}</div></section>\n')
    if shown[-1] is not passages[-1]:
        parts.append(f'<nav><a href="{wider}">Later passages</a></nav>\n')
    return _page(asked, "".join(parts), count, title=hit.path)


def _page(asked: Asked, main: str, count: int, title: str = "", focus: bool = False) -> str:
    buttons = (
        f'<button name="retriever" value="{way}" aria-pressed="{str(way == asked.retriever).lower()}">{words}</button>'
        for way, words in WAYS.items()
    )
    title = title or (f"{asked.query} - search" if asked.query else "Search")
    return PAGE.format(
        title=html.escape(title),
        style=STYLE,
        script=SCRIPT,
        query=html.escape(asked.query),
        longest=LONGEST_QUERY,
        count=f"{count:,}",
        focus=" autofocus" if focus else "",
        retriever=asked.retriever,
        ways="".join(buttons),
        hidden=f'<input type="hidden" name="k" value="{asked.k}">' if asked.k != asked.default_k else "",
        main=main,
    )


def _result(hit: Hit, asked: Asked) -> str:
    place, path = _place(hit.path, hit.line), html.escape(hit.path)
    *above, title = [html.escape(heading) for heading in _headings(hit)] or [f'<bdi dir="ltr">{path}</bdi>']
    place = " · ".join([place, *([f"<bdi>{ARROW.join(above)}</bdi>"] if above else []), f"{hit.score:.3f}"])
    return (
        f'<li dir="auto"><h2><a href="{_address(hit.path, hit.number, asked)}">{title}</a></h2>'
        f'<p dir="auto">{mark(snippet(hit.text, asked.query), asked.query)}</p>'
        f'<p class="place" dir="ltr">{place}</p>{_others(hit, asked)}</li>\n'
    )


def _headings(hit: Hit) -> list[str]:
    """The headings of a passage without the name of its file, which its path says."""
    headings = hit.title.split(" > ") if hit.title else []
    return headings[PurePosixPath(hit.path).stem.replace("_", " ") in headings[:1] :]


def _others(hit: Hit, asked: Asked) -> str:
    if not hit.others:
        return ""
    links = [
        f'<li><a href="{_address(path, number, asked)}">{_place(path, line)}</a></li>'
        for path, line, number in hit.others[:MOST_PLACES]
    ]
    links += [f"<li>and {len(hit.others) - MOST_PLACES:,} more</li>"] if len(hit.others) > MOST_PLACES else []
    places = "another place" if len(hit.others) == 1 else f"{len(hit.others):,} other places"
    return f"<details><summary>The same text in {places}</summary><ul>{''.join(links)}</ul></details>"


def _address(path: str, number: int, asked: Asked) -> str:
    return asked.link("/passage", path=path, number=number) + "#hit"


def _place(path: str, line: int) -> str:
    return f'<bdi dir="ltr">{html.escape(path)}</bdi>, {unit_of(path)} {line}'


def mark(text: str, query: str) -> str:
    """``text`` as HTML with the words of the query marked."""
    parts, done = [], 0
    for start, end in marked(text, query):
        parts += [html.escape(text[done:start]), f"<mark>{html.escape(text[start:end])}</mark>"]
        done = end
    return "".join([*parts, html.escape(text[done:])])
