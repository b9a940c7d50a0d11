"""Tokenise raw text into memory-mapped shards, with the borders of documents kept.

    python preprocess.py --datapath wiki.txt --outdir encoded/wiki
    python preprocess.py --datapath ccnet_sw.txt --outdir encoded/sw --tokenizer bert-base-multilingual-cased \\
        --normalize_text

A text file has one document per line; a line of a ``.jsonl`` file is an object with ``text`` and, optionally,
``title``; either may end in ``.gz``. Shards are made by several processes. Running the same command again goes on with
the shards that are missing, so a run may be killed at any time; every run ends with the same files.
"""

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
from tqdm import tqdm

from contriever.encoder import find_model, read_tokenizer
from contriever.flags import check_minimum
from contriever.text.files import open_bytes, read_json
from contriever.text.tokens import Job, tokenize_lines, vocabulary_fingerprint, write_shard
from shared import distributed
from shared.images.loading import default_num_workers
from shared.run.flags import Parser


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
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


def line_starts(path: Path, block_bytes: int) -> list[int]:
    """Bytes at which shards begin: the first line after each multiple of ``block_bytes``; ends with the file's size."""
    starts = [0]
    with open_bytes(path) as file:
        size = file.seek(0, os.SEEK_END)
        while starts[-1] + block_bytes < size:
            file.seek(starts[-1] + block_bytes - 1)
            file.readline()
            starts.append(file.tell())
    return [*starts, size] if starts[-1] < size else starts


def plan(args: argparse.Namespace, vocabulary: str, tokenizer: str) -> list[Job]:
    """All shards of a data set."""
    jobs = []
    facts = {"tokenizer": tokenizer, "vocabulary": vocabulary}
    facts |= {"normalize_text": args.normalize_text, "on_bad_bytes": args.on_bad_bytes}
    for source in map(Path, args.datapath):
        starts = line_starts(source, max(1, round(args.shard_mb * 1e6))) if source.is_file() else []
        if len(starts) < 2:
            raise ValueError(f"--datapath {source} is {'empty' if starts else 'no file'}")
        for i, (start, end) in enumerate(itertools.pairwise(starts)):
            shard = Path(args.outdir) / f"{Path(source.name.removesuffix('.gz')).stem}-{i:05d}"
            jobs.append(Job.of(source, shard, start, end, **facts))
    if len({job.shard for job in jobs}) < len(jobs):
        raise ValueError("--datapath has several files of the same name; give each an --outdir of its own")
    return jobs


def missing_jobs(jobs: list[Job], overwrite: bool) -> list[Job]:
    """Shards that are not there yet; ``ValueError`` if some there were made in another way, without ``overwrite``."""
    sources, wanted = {job.source.name for job in jobs}, {job.shard for job in jobs}
    # the folder may also hold shards of other files, made by other calls
    present = {
        file.with_suffix(""): read_json(file)
        for file in jobs[0].shard.parent.glob("*.json")
        if file.with_suffix(".tokens.npy").exists()
    }
    stale = [shard for shard, facts in present.items() if facts["source"] in sources and shard not in wanted]
    wrong = {job.shard for job in jobs if not job.facts.items() <= present.get(job.shard, job.facts).items()}
    stale += sorted(wrong)
    if stale and not overwrite:
        raise ValueError(
            f"{stale[0]} is there already and comes from another text or other flags; --overwrite replaces it"
        )
    for shard in stale:  # its json first: without it the shard does not count
        for ending in (".json", ".tokens.npy", ".borders.npy"):
            shard.with_name(shard.name + ending).unlink(missing_ok=True)
    return [job for job in jobs if job.shard not in present or job.shard in wrong]


tokenizer_in = functools.cache(read_tokenizer)  # read once by each worker process


def make_shard(job: Job) -> tuple[int, int, int]:
    """Tokenise one shard in a worker process; numbers of tokens, of documents, and of those that are empty."""
    tokens, borders = tokenize_lines(job, tokenizer_in(Path(job.facts["tokenizer"])))
    write_shard(job.shard, tokens, borders, job.facts)
    return len(tokens), len(borders) - 1, int((np.diff(borders) == 0).sum())


def preprocess(args: argparse.Namespace) -> None:
    """Make every shard that is missing."""
    check_minimum(args, num_workers=1)
    if args.shard_mb <= 0:
        raise ValueError(f"--shard_mb {args.shard_mb} must be positive")
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
    workers = min(args.num_workers, len(missing))
    with contextlib.ExitStack() as stack:
        each = map
        if workers > 1:
            context = multiprocessing.get_context("forkserver")  # a tokenizer's threads do not survive a plain fork
            context.set_forkserver_preload(["contriever.preprocess"])  # imported once, not by every process
            each = stack.enter_context(context.Pool(workers)).imap_unordered
        results = each(make_shard, missing)
        for counts in tqdm(results, total=len(missing), unit="shard", disable=not sys.stderr.isatty()):
            totals += counts
    print(f"{args.outdir}: {totals[0]} tokens, {totals[1]} documents ({totals[2]} empty) in {len(missing)} new shards")


def main() -> None:
    distributed.run_script(preprocess, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
