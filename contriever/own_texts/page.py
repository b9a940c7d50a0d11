"""A search box in the browser, for one person on one machine, with the standard library's HTTP server.

The server answers ``/?q=...`` and ``/passage?path=...&number=...`` with HTML, and ``/search.json?q=...`` with JSON.
Texts are other people's: everything is escaped, the page may load nothing, only what is indexed can be read, and a
request that comes under another host's name (DNS rebinding) is refused.
"""

import json
import re
import socket
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from .background import LiveIndex, NotReady
from .index import Hit, answer
from .rendering import AROUND, LONGEST_QUERY, MOST_RESULTS, SCRIPT_SOURCE, WAYS, Asked, render_passage, render_results
from .walk import describe_left_out

LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src '{SCRIPT_SOURCE}'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class SearchServer(ThreadingHTTPServer):
    """Answers queries on an index, which a thread of its own brings up to date."""

    daemon_threads = True

    def __init__(self, index: LiveIndex, host: str, port: int, top_k: int, retriever: str, dense_weight: float):
        self.index, self.retriever, self.dense_weight = index, retriever, dense_weight
        self.top_k = min(top_k, MOST_RESULTS)
        self.only_local = host in LOCAL_NAMES
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        index.on_end = self.shutdown
        index.start()

    def handle_error(self, request, client_address) -> None:
        """A browser that closes its connection before the answer is no error of the server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class NotFound(ValueError):
    """What a request asks for is not there; the message is for its sender."""


def number(text: str) -> int:
    """A number of a request; -1 if it is none that can be asked for."""
    return int(text) if text.isdecimal() and len(text) <= 9 else -1


class Handler(BaseHTTPRequestHandler):
    server: SearchServer
    server_version, sys_version = "search", ""
    timeout = 30  # seconds for a request to arrive

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if self.server.only_local and not self._asked_by_local_name():
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "this server answers to local names only\n")
        elif address.path == "/":
            self._answer(address.query, self._find, self._page)
        elif address.path == "/search.json":
            self._answer(address.query, self._find, self._json)
        elif address.path == "/passage":
            self._answer(address.query, self._read, self._passage)
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "not found\n")

    def _asked_by_local_name(self) -> bool:
        host = self.headers.get("Host", "").lower()
        return re.sub(r":\d+$", "", host).strip("[]") in LOCAL_NAMES

    def _answer(self, query_string: str, find: Callable, render: Callable) -> None:
        values = {name: found[0] for name, found in parse_qs(query_string, keep_blank_values=True).items()}
        asked, problem = self._asked(values)
        status, found = HTTPStatus.BAD_REQUEST if problem else HTTPStatus.OK, None
        try:
            found = None if problem else find(asked, values)
        except NotFound as error:
            problem, status = str(error), HTTPStatus.NOT_FOUND
        except NotReady as error:
            problem, status = str(error), HTTPStatus.SERVICE_UNAVAILABLE
        except (ValueError, OSError) as error:  # the folder or the index may have gone
            problem, status = str(error), HTTPStatus.INTERNAL_SERVER_ERROR
        self._send(status, *render(asked, found, problem))

    def _asked(self, values: dict[str, str]) -> tuple[Asked, str]:
        """What was asked, with defaults where that cannot be answered, and why it cannot be."""
        server, query, problem = self.server, values.get("q", "").strip(), ""
        k, retriever = values.get("k", str(server.top_k)), values.get("retriever", server.retriever)
        if len(query) > LONGEST_QUERY:
            problem = f"the query has more than {LONGEST_QUERY} characters"
        if not 1 <= number(k) <= MOST_RESULTS:
            k, problem = server.top_k, f"k must be a number from 1 to {MOST_RESULTS}"
        if retriever not in WAYS:
            retriever, problem = server.retriever, f"retriever must be one of {', '.join(WAYS)}"
        return Asked(query, retriever, int(k), server.top_k), problem

    def _find(self, asked: Asked, values: dict[str, str]) -> list[Hit] | None:
        """The hits; None where nothing was asked."""
        if not asked.query:
            return None
        return self.server.index.search(asked.query, asked.k, asked.retriever, self.server.dense_weight)

    def _read(self, asked: Asked, values: dict[str, str]) -> tuple[list[Hit], int, int]:
        """A passage with its neighbours, its number, and how many of them are shown on each side."""
        place, around = number(values.get("number", "")), max(1, number(values.get("around", str(AROUND))))
        found = self.server.index.passages(values.get("path", ""), place - around - 1, place + around + 1)
        if not any(hit.number == place for hit in found):
            raise NotFound("There is no such passage, or no longer.")
        return found, place, around

    def _page(self, asked: Asked, hits: list[Hit] | None, problem: str) -> tuple[str, str]:
        index = self.server.index
        left_out = describe_left_out(index.left_out)
        return "text/html", render_results(asked, hits, len(index), problem, index.state, left_out)

    def _json(self, asked: Asked, hits: list[Hit] | None, problem: str) -> tuple[str, str]:
        index = self.server.index
        found = answer(asked.query, hits or [], index.left_out, index.state)
        found = {"error": problem, "state": index.state} if problem else found
        return "application/json", json.dumps(found)  # no control characters

    def _passage(self, asked: Asked, found: tuple[list[Hit], int, int] | None, problem: str) -> tuple[str, str]:
        if found is None:
            return self._page(asked, None, problem)
        return "text/html", render_passage(asked, *found, len(self.server.index))

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
