"""Retrieve passages for open-domain questions (Contriever, section 4.2) and mark those that contain an answer.

    python passage_retrieval.py --model_name_or_path facebook/contriever --passages psgs_w100.tsv \\
        --passages_embeddings "contriever_embeddings/*" --data nq/test.json --output_dir contriever_nq
                                                                      # released Contriever on NQ: R@20 67.8, R@100 82.1

Each result file has a question per line: what the input said, and ``ctxs``, the passages with their scores, best first.
Under torchrun every process holds the index of its own shards.
"""

import argparse
import glob
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np

from contriever.encoder import Retriever
from contriever.evaluate_retrieved_passages import accuracy_at, format_accuracies
from contriever.flags import add_encoder_flags, check_minimum, load_encoder
from contriever.index.dense import INDEX_MINIMUM, DenseIndex, IndexSettings, add_index_flags
from contriever.index.embeddings import Shard, missing_shards, open_shards
from contriever.index.passages import PassageFile, read_questions
from contriever.text.answers import match_questions
from contriever.text.files import first_difference, write_json_lines
from contriever.text.normalize import clean
from shared import distributed
from shared.run.flags import Parser


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data", required=True, help="glob pattern of .json or .jsonl files with question and answers")
    add("--passages", required=True, help="the file that was given to generate_passage_embeddings.py")
    add("--passages_embeddings", required=True, help="glob pattern of its shards, or of files of the official script")
    add("--output_dir", required=True, help="folder for the results, which keep the names of their inputs")
    add("--n_docs", type=int, default=100, help="passages per question")
    add("--validation_workers", type=int, default=32, help="processes at most for the matching of answers")

    add = add_encoder_flags(parser)
    add("--per_gpu_batch_size", type=int, default=64, help="questions per forward pass")
    add("--question_maxlength", type=int, default=512, help="tokens; what is longer is cut")
    add("--norm_query", action="store_true", help="divide vectors by their length; not for Contriever")
    add("--lowercase", action="store_true", help="questions, first")
    add("--normalize_text", action="store_true", help="one form for dashes, quotation marks and the like in questions")

    add_index_flags(parser)
    add = parser.add_argument_group("index storage").add_argument
    add("--save_or_load_index", action="store_true", help="keep the index beside the embeddings and use it again")
    add("--projection_size", type=int, default=None, help="length of the vectors; only checked")
    for flag in ("--lang", "--dataset"):  # the official script reads them and does nothing with them
        add(flag, nargs="+", default=None, help="not supported: it has no effect in the official script")
    return parser


def passage_retrieval(args: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Write the results of every input file; ``{input: {k: accuracy in percent}}``, on rank 0."""
    check_minimum(args, n_docs=1, per_gpu_batch_size=1, question_maxlength=3, validation_workers=1, **INDEX_MINIMUM)
    device = distributed.init(device=args.device)
    for flag in ("lang", "dataset"):
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag} is not supported: choose the files with --data")
    files = data_files(args.data, args.output_dir)
    questions = {file: read_questions(file) for file in files}
    shards = open_shards(args.passages_embeddings)
    if args.projection_size not in (None, shards[0].vectors.shape[1]):
        raise ValueError(f"--projection_size {args.projection_size}: vectors have {shards[0].vectors.shape[1]} numbers")
    retriever = load_encoder(args, device, args.norm_query)
    check_same_model(retriever, shards, args)
    passages = PassageFile(args.passages) if distributed.is_main_process() else None
    if passages is not None and shards[0].settings.get("passages", passages.crc) != passages.crc:
        raise ValueError(
            f"--passages {args.passages} is not the file that {shards[0].path} was made of, or has changed since"
        )
    settings = IndexSettings.from_args(args)
    folder = shards[0].path.parent / f"index-{settings.kind}" if args.save_or_load_index else None
    index = DenseIndex(shards, settings, folder, args.indexing_batch_size, device)
    distributed.print_once(f"{settings.kind} index of {len(index)} passages in {len(shards)} shards")
    accuracies = {}
    for file in files:
        queries = retriever.encode(
            clean([record["question"] for record in questions[file]], args.lowercase, args.normalize_text),
            args.per_gpu_batch_size,
            retriever.length("--question_maxlength", args.question_maxlength),
            normalize=args.norm_query,
            amp=retriever.amp(args.no_fp16),
            kind="query",
        )
        scores, rows = index.search(queries, args.n_docs)
        if distributed.is_main_process():
            results = add_passages(questions[file], scores, rows, index, passages, args.validation_workers)
            write_json_lines(result_file(file, args.output_dir), results)
            accuracies[file] = accuracy_at([[ctx["hasanswer"] for ctx in result["ctxs"]] for result in results])
            print(f"{file}: {format_accuracies(accuracies[file])}", flush=True)
    distributed.barrier()
    return accuracies


def data_files(pattern: str, output_dir: str) -> list[str]:
    """Files of a glob pattern, whose results must neither overwrite each other nor them."""
    files = sorted(glob.glob(pattern))
    if not files:
        raise ValueError(f"--data {pattern}: no such file")
    by_name = {}
    for file in files:
        result = result_file(file, output_dir)
        if result in by_name:
            raise ValueError(f"--data: {by_name[result]} and {file} would have the same result file")
        by_name[result] = file
        if Path(file).resolve().parent == Path(output_dir).resolve():
            raise ValueError(f"--output_dir {output_dir}: the results would overwrite {file}")
    return files


def result_file(data_file: str, output_dir: str) -> Path:
    """For the results of a file of questions: of its name, but never compressed."""
    return Path(output_dir) / Path(data_file.removesuffix(".gz")).name


def check_same_model(retriever: Retriever, shards: list[Shard], args: argparse.Namespace) -> None:
    """Raise ``ValueError`` unless questions and passages are encoded by one model, in one way."""
    settings = shards[0].settings
    if not settings:
        distributed.print_once(f"NOTE: {shards[0].path} is in the official format, which does not name its model")
        return
    ours = {"prefix": "", **retriever.identity(), "normalized": args.norm_query}
    if key := first_difference(ours, {key: settings.get(key, "") for key in ours}):
        raise ValueError(
            f"{shards[0].path} was made by another model or in another way: its {key} is {settings.get(key)!r}, that "
            f"of the questions is {ours[key]!r} ({retriever.origin})"
        )
    for key in ("lowercase", "normalize_text"):
        if settings[key] != getattr(args, key):
            distributed.print_once(f"NOTE: --{key} is {getattr(args, key)} for questions, {settings[key]} for passages")
    if missing := missing_shards(shards):
        distributed.print_once(f"NOTE: shards {missing} of the collection are not searched")


def add_passages(
    records: list[dict], scores: np.ndarray, rows: np.ndarray, index: DenseIndex, passages: PassageFile, workers: int
) -> list[dict]:
    """The records with ``ctxs``: passages with id, title, text, score (a string, as the reference writes it) and
    hasanswer, best first."""
    results = []
    for record, of_query, row_numbers in zip(records, scores, rows.tolist(), strict=True):
        found = [(passages.find(index.id(row)), s) for row, s in zip(row_numbers, of_query, strict=True) if row >= 0]
        results.append({**record, "ctxs": [{**vars(passage), "score": str(score)} for passage, score in found]})
    hits = match_questions(
        [(result["answers"], [ctx["text"] for ctx in result["ctxs"]]) for result in results], workers
    )
    for result, of_question in zip(results, hits, strict=True):
        for ctx, hit in zip(result["ctxs"], of_question, strict=True):
            ctx["hasanswer"] = hit
    return results


def main() -> None:
    distributed.run_script(passage_retrieval, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
