"""Tokenise raw text into memory-mapped shards, with the borders of documents kept.

    python preprocess.py --datapath wiki.txt --outdir encoded/wiki
    python preprocess.py --datapath ccnet_sw.txt --outdir encoded/sw --tokenizer bert-base-multilingual-cased \\
        --normalize_text

A text file has one document per line; a line of a ``.jsonl`` file is an object with ``text`` and, optionally,
``title``. Shards are made by several processes. Running the same command again goes on with the shards that are
missing, so a run may be killed at any time; every run ends with the same files.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contriever.encoder import find_model, read_tokenizer
from contriever.normalize_text import normalize
from contriever.passages import parse_object, text_field
from contriever.text_files import line_number, read_lines
from contriever.tokens import write_shard
from shared import distributed
from shared.images.loading import default_num_workers

LINES_AT_ONCE = 1000


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "preprocess", description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--datapath", nargs="+", required=True, help="text files, one document per line, or .jsonl files")
    add("--outdir", required=True, help="folder of the shards: one data set of train.py")
    add("--tokenizer", default=None, help="folder or name of an encoder; by default the packaged one")
    add("--allow_download", action="store_true", help="ask the hub for a tokenizer that is not on this machine")
    add("--normalize_text", action="store_true", help="one form for dashes, quotation marks, ... (mContriever)")
    add("--overwrite", action="store_true", help="replace shards that were made in another way")
    add("--on_bad_bytes", default="error", choices=("error", "replace"), help="what bytes that are not UTF-8 do")
    add("--shard_mb", type=float, default=256, help="size of the text of one shard in MB")
    add("--num_workers", type=int, default=max(1, default_num_workers(64)), help="processes")
    return parser


@dataclass(frozen=True)
class Job:
    """One shard: the lines of a file that begin at ``start`` or later and before ``end``, and how to read them."""

    source: str
    start: int
    end: int
    shard: str
    tokenizer: str
    normalize_text: bool
    on_bad_bytes: str
    source_bytes: int
    source_mtime_ns: int
    vocabulary: str

    def facts(self) -> dict:
        """What the shard's json file keeps: where the file lies does not matter."""
        return {**asdict(self), "source": Path(self.source).name, "shard": Path(self.shard).name}


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary, to recognise text that was tokenised with another one."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def line_starts(path: Path, block_bytes: int) -> list[int]:
    """Bytes at which shards begin: the first line after each multiple of ``block_bytes``; ends with the file's size."""
    size, starts = path.stat().st_size, [0]
    with open(path, "rb") as file:
        while starts[-1] + block_bytes < size:
            file.seek(starts[-1] + block_bytes - 1)
            file.readline()
            starts.append(file.tell())
    return [*starts, size] if starts[-1] < size else starts


def plan(args: argparse.Namespace, vocabulary: str, tokenizer: str) -> list[Job]:
    """All shards of a data set.

    Raises:
        ValueError: If a file is missing or empty, or two would get the same shards.
    """
    jobs = []
    for source in map(Path, args.datapath):
        if not source.is_file() or not source.stat().st_size:
            raise ValueError(f"--datapath {source} is {'empty' if source.is_file() else 'no file'}")
        starts = line_starts(source, max(1, round(args.shard_mb * 1e6)))
        for i, (start, end) in enumerate(itertools.pairwise(starts)):
            status = source.stat()
            shard = str(Path(args.outdir) / f"{source.stem}-{i:05d}")
            jobs.append(
                Job(str(source), start, end, shard, tokenizer, args.normalize_text, args.on_bad_bytes, status.st_size,
                    status.st_mtime_ns, vocabulary)
            )  # fmt: skip
    names = [job.shard for job in jobs]
    if len(set(names)) < len(names):
        raise ValueError("--datapath has several files of the same name; give each an --outdir of its own")
    return jobs


def missing_jobs(jobs: list[Job], overwrite: bool) -> list[Job]:
    """Shards that are not there yet.

    Raises:
        ValueError: If one that is there, or a surplus one, was made in another way, and unless ``overwrite``.
    """
    sources, wanted = {job.facts()["source"] for job in jobs}, {job.shard for job in jobs}
    # the folder may also hold shards of other files, made by other calls
    present = {
        str(file.with_suffix("")): json.loads(file.read_text())
        for file in Path(jobs[0].shard).parent.glob("*.json")
        if file.with_suffix(".tokens.npy").exists()
    }
    stale = [shard for shard, facts in present.items() if facts["source"] in sources and shard not in wanted]
    missing = []
    for job in jobs:
        facts = present.get(job.shard)
        if facts is None:
            missing.append(job)
        elif job.facts().items() <= facts.items():
            continue
        else:
            stale.append(job.shard)
            missing.append(job)
    if stale and not overwrite:
        raise ValueError(
            f"{stale[0]} is there already and comes from another text or other flags; --overwrite replaces it"
        )
    for shard in stale:  # its json first: without it the shard does not count
        for ending in (".json", ".tokens.npy", ".borders.npy"):
            Path(shard + ending).unlink(missing_ok=True)
    return missing


_tokenizer: PreTrainedTokenizerBase | None = None  # of a worker process


def _start_worker(tokenizer: str) -> None:
    global _tokenizer
    _tokenizer = read_tokenizer(Path(tokenizer))


def make_shard(job: Job) -> tuple[int, int, int]:
    """Tokenise one shard in a worker process.

    Returns:
        Numbers of tokens, of documents, and of those that are empty.
    """
    tokens, borders = tokenize_lines(job, _tokenizer)
    write_shard(Path(job.shard), tokens, borders, job.facts())
    return len(tokens), len(borders) - 1, int((np.diff(borders) == 0).sum())


def tokenize_lines(job: Job, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of all documents (N,), without special tokens and uncut, and their borders (documents + 1,)."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    parts, lengths, waiting = [np.zeros(0, dtype)], [], []

    def flush() -> None:
        ids = tokenizer(waiting, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
                        verbose=False)["input_ids"] if waiting else []  # fmt: skip
        parts.append(np.fromiter((i for document in ids for i in document), dtype))
        lengths.extend(map(len, ids))
        waiting.clear()

    for position, line in read_lines(job.source, job.start, job.end, job.on_bad_bytes):
        text = document_text(job.source, position, line) if job.source.endswith(".jsonl") else line
        waiting.append(normalize(text) if job.normalize_text else text)
        if len(waiting) == LINES_AT_ONCE:
            flush()
    flush()
    return np.concatenate(parts), np.cumsum([0, *lengths], dtype=np.int64)


def document_text(source: str, position: int, line: str) -> str:
    """Title and text of a line of a ``.jsonl`` file; a blank line is an empty document."""
    if not line.strip():
        return ""
    try:
        record = parse_object(line, source, 0)
        title, text = (
            text_field(record, "title", f"{source}, line 0", ""),
            text_field(record, "text", f"{source}, line 0"),
        )
    except ValueError as error:  # counting lines costs a pass over the file: only when it is needed
        raise ValueError(str(error).replace("line 0", f"line {line_number(source, position)}", 1)) from None
    return f"{title} {text}" if title else text


def preprocess(args: argparse.Namespace) -> None:
    """Make every shard that is missing."""
    for flag in ("num_workers", "shard_mb"):
        if getattr(args, flag) <= 0:
            raise ValueError(f"--{flag} {getattr(args, flag)} must be positive")
    folder = find_model(args.tokenizer, args.allow_download)
    tokenizer = read_tokenizer(folder)
    Path(args.outdir).mkdir(parents=True, exist_ok=True)
    jobs = plan(args, vocabulary_fingerprint(tokenizer), str(folder))
    missing = missing_jobs(jobs, args.overwrite)
    if len(missing) < len(jobs):
        print(f"{args.outdir}: {len(jobs) - len(missing)} of {len(jobs)} shards are there already")
    if not missing:
        return
    totals = np.zeros(3, dtype=np.int64)
    # not a plain fork: threads of the tokenizers library do not survive it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["contriever.preprocess"])  # imported once, not by every process
    workers = min(args.num_workers, len(missing))
    if workers <= 1:
        _start_worker(str(folder))
        results = map(make_shard, missing)
    else:
        pool = context.Pool(workers, _start_worker, (str(folder),))
        results = pool.imap_unordered(make_shard, missing)
    for counts in tqdm(results, total=len(missing), unit="shard", disable=not sys.stderr.isatty()):
        totals += counts
    if workers > 1:
        pool.close()
        pool.join()
    print(f"{args.outdir}: {totals[0]} tokens, {totals[1]} documents ({totals[2]} empty) in {len(missing)} new shards")


def main() -> None:
    with distributed.clean_exit():
        preprocess(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
