"""Search a folder of texts by meaning, offline.

    python search.py --passages my_notes --query "how to keep bread fresh"
    python search.py --passages my_notes --serve                              # a search box at http://127.0.0.1:8000

Takes .txt, .md, .rst, .org, .html, .py and .csv files, .jsonl (objects with ``text``, perhaps ``title``), and .pdf and
.docx with the extra ``documents``. The first call embeds all of them, later ones only what is new or has changed. The
index is one file in the folder, ``.search_index.sqlite``; nothing leaves the machine.
"""

import argparse
import contextlib
import functools
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contriever.flags import add_encoder_flags, check_minimum, load_encoder
from contriever.index.bm25 import check_weight
from contriever.own_texts.folder import Limits, place, snippet
from contriever.own_texts.index import SearchIndex, Update
from contriever.own_texts.page import serve
from contriever.own_texts.walk import text_files
from contriever.text.normalize import clean
from shared import distributed
from shared.run.flags import Parser

INDEX_NAME = ".search_index.sqlite"
SECONDS_BETWEEN_LINES = 10  # of progress, where there is no terminal


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument_group("texts").add_argument
    add("--passages", required=True, help="folder of texts, or one file")
    pattern = "leave out what fits, as in .gitignore; may be repeated. .gitignore and .ignore in the folder are obeyed"
    add("--exclude", action="append", default=[], metavar="PATTERN", help=pattern)
    add("--follow_links", action="store_true", help="read folders behind symbolic links, too")
    add("--index_path", default=None, help=f"file of the index; by default {INDEX_NAME} in the folder")
    add("--rebuild", action="store_true", help="make the index from scratch")
    add("--max_words", type=int, default=120, help="per passage, and no more than the encoder reads; the paper: 100")
    add("--normalize_text", action="store_true", help="one form for dashes, quotation marks, ... (mContriever)")

    add = parser.add_argument_group("search").add_argument
    add("--query", default=None, help="what to search for; without it and --serve the index is only brought up to date")
    add("--top_k", type=int, default=5, help="passages to show")
    add("--retriever", default="dense", choices=("dense", "bm25", "hybrid"), help="by meaning, by words, or both")
    add("--dense_weight", type=float, default=0.5, help="of meaning in hybrid, the rest is words")

    add = parser.add_argument_group("page").add_argument
    add("--serve", action="store_true", help="answer in a web page")
    add("--host", default="127.0.0.1", help="address to serve at; any other lets others read the texts")
    add("--port", type=int, default=8000, help="0: any free one")

    add = add_encoder_flags(parser)
    add("--per_gpu_batch_size", type=int, default=32, help="passages per forward pass")
    return parser


def search(args: argparse.Namespace) -> SearchIndex:
    """Bring the index up to date, then answer the query or serve the page."""
    check_minimum(args, top_k=1, max_words=1, per_gpu_batch_size=1, port=0)
    if args.port > 65535:
        raise ValueError(f"--port {args.port} is more than 65535")
    check_weight(args.dense_weight)
    index = open_index(args)
    began = time.time()
    with progress() as tell:
        update = index.update(tell)
    for remark in update.remarks():
        print(printable(remark), file=sys.stderr, flush=True)
    print(f"{update.describe()}, {len(index)} in all, {time.time() - began:.1f} s", flush=True)
    how = args.top_k, args.retriever, args.dense_weight
    if args.query is not None:
        hits = index.search(args.query, *how)
        for rank, hit in enumerate(hits, start=1):
            title = f"  {hit.title}" if hit.title else ""
            print(f"\n{rank}. {hit.score:.3f}  {printable(place(hit.path, hit.line) + title)}")
            print(f"   {printable(snippet(hit.text, args.query))}")
        if not hits:
            print("nothing found")
    if args.serve:
        serve(index, args.host, args.port, *how)
    return index


@contextlib.contextmanager
def progress() -> Iterator[Callable[[Update], None]]:
    """Show how much is indexed and the time that is left: a bar in a terminal, lines in a file."""
    began = told = time.monotonic()

    def tell(update: Update) -> None:
        nonlocal told
        bar.total = update.size
        bar.update(update.done - bar.n)
        if bar.disable and time.monotonic() - told >= SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            what = "indexed {percentage:.0f} % of {total_fmt}B, {remaining} left"
            facts = {"unit": "B", "unit_scale": True, "bar_format": what}
            print(tqdm.format_meter(update.done, update.size, told - began, **facts), file=sys.stderr, flush=True)

    with tqdm(desc="indexing", unit="B", unit_scale=True, delay=1, leave=False, disable=None) as bar:
        yield tell


def printable(text: str) -> str:
    """``text`` without the control characters that a terminal obeys."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", text)


def open_index(args: argparse.Namespace) -> SearchIndex:
    """The index of the folder, made by the encoder of the flags."""
    root = Path(args.passages)
    if not root.exists():
        raise ValueError(f"--passages {root}: no such file or folder")
    default = root / INDEX_NAME if root.is_dir() else root.with_name(f".{root.name}{INDEX_NAME}")
    file = Path(args.index_path) if args.index_path else default
    if args.rebuild and file.exists():
        with open(file, "rb") as old:
            if not file.name.endswith(INDEX_NAME) and old.read(16) not in (b"SQLite format 3\0", b""):
                raise ValueError(f"--index_path {file} is no index: --rebuild does not remove it")
        file.unlink()
    encoder = Encoder(args)
    settings = {"normalized": encoder.retriever.normalized, "normalize_text": args.normalize_text}
    settings |= encoder.retriever.identity()
    choice = functools.partial(text_files, exclude=args.exclude, follow_links=args.follow_links)
    return SearchIndex(root, file, encoder, settings, encoder.limits(args.max_words), choice)


class Encoder:
    """From texts to vectors, of unit length if the model was trained so."""

    def __init__(self, args: argparse.Namespace):
        self.retriever = load_encoder(args, distributed.init(device=args.device), normalized=True)
        self.normalize_text, self.batch_size = args.normalize_text, args.per_gpu_batch_size
        self.amp = self.retriever.amp(args.no_fp16)

    def __call__(self, texts: list[str], kind: str) -> np.ndarray:
        normalize = self.retriever.normalized
        return self.retriever.encode(self.clean(texts), self.batch_size, None, normalize, self.amp, kind)

    def clean(self, texts: list[str]) -> list[str]:
        return clean(texts, False, self.normalize_text)

    def limits(self, max_words: int) -> Limits:
        """Passages that the encoder reads whole."""
        retriever = self.retriever
        length = (retriever.default_length or retriever.max_length) - len(retriever.tokenize([""], kind="passage")[0])
        return Limits(max_words, length, retriever.token_ends, lambda text: self.clean([text])[0])


def main() -> None:
    with distributed.clean_exit():
        search(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
