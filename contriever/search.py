"""Search a folder of texts by meaning, offline.

    python search.py --passages my_notes --query "how to keep bread fresh"
    python search.py --passages my_notes --serve                              # a search box at http://127.0.0.1:8000

Takes .txt, .md, .rst, .org, .html, .py and .csv files, .jsonl (objects with ``text``, perhaps ``title``), and .pdf and
.docx with the extra ``documents``. The first call embeds all of them, later ones only what is new or has changed, and
answer in a second, because they import torch for many new texts only. The index is one file in the folder,
``.search_index.sqlite``; nothing leaves the machine.
"""

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np

from contriever import onnx_encoder
from contriever.flags import add_encoder_flags, check_minimum, with_prefixes
from contriever.index.bm25 import check_weight
from contriever.model_files import find_model
from contriever.own_texts.folder import Limits, place, snippet
from contriever.own_texts.index import PASSAGES_PER_TRANSACTION, Hit, SearchIndex, Update, answer
from contriever.own_texts.walk import text_files
from contriever.text.normalize import clean
from shared.run.command_line import Parser, plain_exit, printable

if TYPE_CHECKING:
    from contriever.encoder import Retriever

INDEX_NAME = ".search_index.sqlite"
SECONDS_BETWEEN_LINES = 10  # of progress, where there is no terminal
MOST_PLACES = 3  # that are told of the same text


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument_group("texts").add_argument
    add("--passages", required=True, help="folder of texts, or one file")
    pattern = "leave out what fits, as in .gitignore; may be repeated. .gitignore and .ignore in the folder are obeyed"
    add("--exclude", action="append", default=[], metavar="PATTERN", help=pattern)
    add("--follow_links", action="store_true", help="read folders behind symbolic links, too")
    add("--index_path", default=None, help=f"file of the index; by default {INDEX_NAME} in the folder")
    add("--rebuild", action="store_true", help="make the index from scratch")
    add("--drop_missing", action="store_true", help="forget all texts if the folder holds none; else they are kept")
    add("--max_words", type=int, default=120, help="per passage, and no more than the encoder reads; the paper: 100")
    add("--normalize_text", action="store_true", help="one form for dashes, quotation marks, ... (mContriever)")

    add = parser.add_argument_group("search").add_argument
    add("--query", default=None, help="what to search for; without it and --serve the index is only brought up to date")
    add("--top_k", type=int, default=5, help="passages to show")
    add("--retriever", default="dense", choices=("dense", "bm25", "hybrid"), help="by meaning, by words, or both")
    add("--dense_weight", type=float, default=0.5, help="of meaning in hybrid, the rest is words")
    add("--json", action="store_true", help="answer with one JSON object; what else there is to tell goes to stderr")
    add("--mcp", action="store_true", help="answer a language model as a tool, on stdin and stdout")

    add = parser.add_argument_group("page").add_argument
    add("--serve", action="store_true", help="answer in a web page")
    add("--host", default="127.0.0.1", help="address to serve at; any other lets others read the texts")
    add("--port", type=int, default=8000, help="0: any free one")

    add = add_encoder_flags(parser)
    add("--per_gpu_batch_size", type=int, default=32, help="passages per forward pass")
    return parser


def search(args: argparse.Namespace) -> SearchIndex | None:
    """Bring the index up to date and answer the query; or serve the page, and do the former behind it."""
    check_minimum(args, top_k=1, max_words=1, per_gpu_batch_size=1, port=0)
    if args.port > 65535:
        raise ValueError(f"--port {args.port} is more than 65535")
    check_weight(args.dense_weight)
    if not Path(args.passages).exists():
        raise ValueError(f"--passages {args.passages}: no such file or folder")
    if args.json and args.query is None:
        raise ValueError("--json needs --query")
    if args.mcp and (args.serve or args.query is not None):
        raise ValueError("--mcp goes without --query and --serve")
    how, index = (args.top_k, args.retriever, args.dense_weight), None
    out = sys.stderr if args.json or args.mcp else sys.stdout
    if args.query is not None or not (args.serve or args.mcp):
        index = open_index(args)
        left_out = update(index, args.drop_missing, out).left_out
    if args.query is not None:
        hits = index.search(args.query, *how)
        print(json.dumps(answer(args.query, hits, left_out)) if args.json else listing(hits, args.query), flush=True)
    if args.serve or args.mcp:
        from contriever.own_texts.background import LiveIndex

        def opened() -> SearchIndex:
            return index or open_index(args)

        live = LiveIndex(opened, lambda index, show: update(index, args.drop_missing, out, show))
        if args.mcp:
            from contriever.own_texts.tool import make_server

            make_server(live, Path(args.passages), *how).run("stdio")  # until the client goes
        else:
            from contriever.own_texts.page import serve

            serve(live, args.host, args.port, *how)
    return index


def listing(hits: list[Hit], query: str) -> str:
    """The hits for a person at a terminal."""
    lines = []
    for rank, hit in enumerate(hits, start=1):
        title = f"  {hit.title}" if hit.title else ""
        lines += ["", f"{rank}. {hit.score:.3f}  {place(hit.path, hit.line)}{title}", f"   {snippet(hit.text, query)}"]
        if hit.others:
            more = f" and {len(hit.others) - MOST_PLACES} others" if len(hit.others) > MOST_PLACES else ""
            places = ", ".join(place(path, line) for path, line, _ in hit.others[:MOST_PLACES])
            lines.append(f"   the same text: {places}{more}")
    return "\n".join(printable(line) for line in lines or ["nothing found"])


def update(
    index: SearchIndex, drop_missing: bool, out: IO[str], show: Callable[[Update], object] = lambda update: None
) -> Update:
    """Bring an index up to date, and tell what was done and what could not be read."""
    began = time.time()
    with progress() as tell:
        found = index.update(lambda update: (tell(update), show(update)), drop_missing)
    for remark in found.remarks():
        print(printable(remark), file=sys.stderr, flush=True)
    print(f"{found.describe()}, {len(index)} in all, {time.time() - began:.1f} s", file=out, flush=True)
    return found


@contextlib.contextmanager
def progress() -> Iterator[Callable[[Update], None]]:
    """Show how much is indexed and the time that is left: on one line of a terminal, in lines of a file."""
    told, terminal, width = time.monotonic(), sys.stderr.isatty(), 0

    def tell(update: Update) -> None:
        nonlocal told, width
        if terminal:
            print(f"\r{update.progress():{width}}", end="", file=sys.stderr, flush=True)
            width = len(update.progress())
        elif time.monotonic() - told >= SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            print(update.progress(), file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        if width:
            print(f"\r{'':{width}}\r", end="", file=sys.stderr, flush=True)


def open_index(args: argparse.Namespace) -> SearchIndex:
    """The index of the folder, made by the encoder of the flags."""
    root = Path(args.passages)
    default = root / INDEX_NAME if root.is_dir() else root.with_name(f".{root.name}{INDEX_NAME}")
    file = Path(args.index_path) if args.index_path else default
    if args.rebuild and file.exists():
        with open(file, "rb") as old:
            if not file.name.endswith(INDEX_NAME) and old.read(16) not in (b"SQLite format 3\0", b""):
                raise ValueError(f"--index_path {file} is no index: --rebuild does not remove it")
        file.unlink()
        file.with_name(f"{file.name}-journal").unlink(missing_ok=True)  # of a change that a kill has interrupted
    encoder = Encoder(args)
    settings = {"normalized": encoder.model.normalized, "normalize_text": args.normalize_text}
    settings |= encoder.model.identity()
    choice = functools.partial(text_files, exclude=args.exclude, follow_links=args.follow_links)
    return SearchIndex(root, file, encoder, settings, encoder.limits(args.max_words), choice)


class Encoder:
    """From texts to vectors, of unit length if the model was trained so: of many texts by torch, else by onnxruntime.

    Attributes:
        onnx: None where it cannot be had.
        model: One of both encoders, for what does not depend on who computes.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.onnx = self._open_onnx() if args.device != "cuda" else None
        self.model = with_prefixes(args, self.onnx or self.retriever)

    def _open_onnx(self) -> onnx_encoder.OnnxEncoder | None:
        path = find_model(self.args.model_name_or_path, self.args.allow_download)
        if missing := onnx_encoder.missing_packages():
            found = f"{' and '.join(missing)} is not installed: pip install -e '.[export]'"
        else:
            found = onnx_encoder.read(path)
        if found is None:
            with contextlib.redirect_stdout(sys.stderr):
                found = onnx_encoder.make(path, self.retriever)
        if isinstance(found, str):
            print(printable(f"NOTE: each search waits for torch: {found}"), file=sys.stderr, flush=True)
            return None
        return found

    @functools.cached_property
    def retriever(self) -> "Retriever":
        """The encoder of torch, with the prompts of its folder."""
        from contriever.encoder import load_retriever
        from shared import distributed

        name, options = self.args.model_name_or_path, {"allow_download": self.args.allow_download}
        with contextlib.redirect_stdout(sys.stderr):
            return load_retriever(name, **options, device=distributed.init(device=self.args.device))

    def __call__(self, texts: list[str], kind: str) -> np.ndarray:
        args, texts = self.args, self.clean(texts)
        if self.onnx is not None and len(texts) < PASSAGES_PER_TRANSACTION:
            return self.onnx.encode(texts, args.per_gpu_batch_size, kind)
        model = with_prefixes(args, self.retriever)
        amp = model.amp(args.no_fp16)
        return model.encode(texts, args.per_gpu_batch_size, None, model.normalized, amp, kind)

    def clean(self, texts: list[str]) -> list[str]:
        return clean(texts, False, self.args.normalize_text)

    def limits(self, max_words: int) -> Limits:
        """Passages that the encoder reads whole."""
        length = self.model.max_tokens - len(self.model.tokenize([""], kind="passage")[0])
        return Limits(max_words, length, self.model.token_ends, lambda text: self.clean([text])[0])


def main() -> None:
    with plain_exit():
        search(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
