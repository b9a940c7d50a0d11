"""A search box in the browser, for one person on one machine, with the standard library's HTTP server.

Nothing else is needed for a page without a script: the server answers ``/?q=...`` with HTML and ``/search.json?q=...``
with JSON. Texts are other people's: everything is escaped, the page may load nothing, and requests that come under
another host's name (DNS rebinding) are refused.
"""

import html
import json
import re
import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from .background import LiveIndex, NotReady
from .folder import marked, snippet
from .index import Hit

MOST_RESULTS = 100
LONGEST_QUERY = 2000  # characters
LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }}
  form {{ display: flex; gap: .5rem }}
  input {{ flex: 1; font: inherit; padding: .5rem .7rem; border: 1px solid #888; border-radius: .4rem }}
  button {{ font: inherit; padding: .5rem 1rem }}
  li {{ margin: 1.2rem 0 }} .place {{ color: #666; font-size: .85rem }} p {{ margin: .2rem 0; overflow-wrap: anywhere }}
  @media (prefers-color-scheme: dark) {{ body {{ background: #181818; color: #ddd }} .place {{ color: #999 }} }}
</style>
</head>
<body>
<main>
<form action="/" method="get" role="search">
  <input name="q" value="{query}" aria-label="Search" placeholder="Search {count} passages" maxlength="{longest}"
    autofocus>
  <button>Search</button>
</form>
{results}
</main>
</body>
</html>
"""


def render_page(query: str, hits: list[Hit] | None, count: int, problem: str = "", state: str = "") -> str:
    """The HTML page; ``hits`` is None before anything was asked, ``state`` says what is being indexed."""
    if problem:
        results = f'<p role="alert">{html.escape(problem)}</p>'
    elif hits is None:
        results = ""
    elif hits:
        results = "<ol>" + "".join(_render_hit(hit, query) for hit in hits) + "</ol>"
    else:
        results = "<p>Nothing found.</p>"
    if state:
        results = f'<p role="status">{html.escape(state)}</p>{results}'
    title = f"{query} - search" if query else "Search"
    return PAGE.format(
        title=html.escape(title), query=html.escape(query), count=count, longest=LONGEST_QUERY, results=results
    )


def _render_hit(hit: Hit, query: str) -> str:
    title = f"<strong>{html.escape(hit.title)}</strong>" if hit.title else ""
    return (
        f"<li>{title}<p>{mark(snippet(hit.text, query), query)}</p>"
        f'<span class="place">{html.escape(hit.path)}, line {hit.line} · {hit.score:.3f}</span></li>\n'
    )


def mark(text: str, query: str) -> str:
    """``text`` as HTML with the words of the query marked."""
    parts, done = [], 0
    for start, end in marked(text, query):
        parts += [html.escape(text[done:start]), f"<mark>{html.escape(text[start:end])}</mark>"]
        done = end
    return "".join([*parts, html.escape(text[done:])])


class SearchServer(ThreadingHTTPServer):
    """Answers queries on an index, which a thread of its own brings up to date."""

    daemon_threads = True

    def __init__(self, index: LiveIndex, host: str, port: int, top_k: int, retriever: str, dense_weight: float):
        self.index, self.top_k, self.retriever, self.dense_weight = index, top_k, retriever, dense_weight
        self.only_local = host in LOCAL_NAMES
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        index.on_end = self.shutdown
        index.start()

    def handle_error(self, request, client_address) -> None:
        """A browser that closes its connection before the answer is no error of the server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def search(self, query: str, k: int) -> list[Hit]:
        return self.index.search(query, k, self.retriever, self.dense_weight)


class BadRequest(ValueError):
    """A request that cannot be answered; the message is for its sender."""


class Handler(BaseHTTPRequestHandler):
    server: SearchServer
    server_version, sys_version = "search", ""
    timeout = 30  # seconds for a request to arrive

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if self.server.only_local and not self._asked_by_local_name():
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "this server answers to local names only\n")
        elif address.path == "/":
            self._answer(address.query, self._page)
        elif address.path == "/search.json":
            self._answer(address.query, self._json)
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "not found\n")

    def _asked_by_local_name(self) -> bool:
        host = self.headers.get("Host", "").lower()
        return re.sub(r":\d+$", "", host).strip("[]") in LOCAL_NAMES

    def _answer(self, query_string: str, render) -> None:
        query, hits, problem, status = "", None, "", HTTPStatus.OK
        try:
            query, k = self._parameters(query_string)
            if query:
                hits = self.server.search(query, k)
        except BadRequest as error:
            problem, status = str(error), HTTPStatus.BAD_REQUEST
        except NotReady as error:
            problem, status = str(error), HTTPStatus.SERVICE_UNAVAILABLE
        except (ValueError, OSError) as error:  # the folder or the index may have gone
            problem, status = str(error), HTTPStatus.INTERNAL_SERVER_ERROR
        self._send(status, *render(query, hits, problem))

    def _parameters(self, query_string: str) -> tuple[str, int]:
        values = parse_qs(query_string, keep_blank_values=True)
        query = values.get("q", [""])[0].strip()
        if len(query) > LONGEST_QUERY:
            raise BadRequest(f"the query has more than {LONGEST_QUERY} characters")
        k = values.get("k", [str(self.server.top_k)])[0]
        if not k.isdecimal() or len(k) > 9 or not 1 <= int(k) <= MOST_RESULTS:
            raise BadRequest(f"k must be a number from 1 to {MOST_RESULTS}")
        return query, int(k)

    def _page(self, query: str, hits: list[Hit] | None, problem: str) -> tuple[str, str]:
        return "text/html", render_page(query, hits, len(self.server.index), problem, self.server.index.state)

    def _json(self, query: str, hits: list[Hit] | None, problem: str) -> tuple[str, str]:
        answer = {"error": problem} if problem else {"query": query, "results": [vars(hit) for hit in hits or []]}
        return "application/json", json.dumps({**answer, "state": self.server.index.state})  # no control characters

    def _send(self, status: HTTPStatus, content_type: str, body: str) -> None:
        data = body.encode("utf-8", errors="replace")
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{content_type}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Queries are nobody's business."""


def serve(index: LiveIndex, host: str, port: int, top_k: int, retriever: str, dense_weight: float) -> None:
    """Answer until Ctrl-C, or until the index turns out not to be one."""
    with SearchServer(index, host, port, top_k, retriever, dense_weight) as server:
        name = f"[{host}]" if ":" in host else host
        print(f"search at http://{name}:{server.server_port} (Ctrl-C ends)", flush=True)
        if not server.only_local:
            print(f"WARNING: whoever reaches {host} can read the indexed texts", flush=True)
        server.serve_forever()
    if index.error is None:
        raise SystemExit(1)  # a bug, whose traceback its thread has printed
    raise index.error
