"""Zero-shot retrieval on a data set of BEIR (Contriever, section 4.3): exact search, metrics of trec_eval.

    python eval_beir.py --model_name_or_path facebook/contriever --beir_dir /path/to/beir --dataset scifact
                                                                   # released Contriever: nDCG@10 64.9, recall@100 92.6
    python eval_beir.py --beir_dir /path/to/beir --dataset scifact --retriever hybrid --norm_query --norm_doc
    python eval_beir.py --beir_dir /path/to/trec --dataset robust --split 2004 --run first.trec --complete

The data set is a folder with corpus.jsonl, queries.jsonl and qrels/test.tsv; dev.tsv is read for msmarco. A folder of
such folders (cqadupstack) is evaluated one by one and averaged. Files may have the names of MS MARCO and TREC instead:
collection.tsv, queries.<split>.tsv or topics.<split>.txt, qrels.<split>.tsv or .txt; and any of them may end in .gz.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
from torch import Tensor

from contriever.beir import (
    QRELS,
    BeirDataset,
    PerQuery,
    Run,
    evaluate_queries,
    find_file,
    means,
    read_beir,
    read_judgements,
    read_run,
)
from contriever.encoder import Retriever
from contriever.flags import add_encoder_flags, check_minimum, load_encoder
from contriever.index.answers import Answers, merge, nothing_found
from contriever.index.bm25 import BM25, check_weight, fuse
from contriever.index.rerank import CrossEncoder, rerank
from contriever.text.files import ending, replacing, write_json, write_json_lines
from contriever.text.normalize import clean
from shared import distributed
from shared.evaluation.knn import nearest_neighbours
from shared.run.flags import Parser, bool_flag

TOP_K = 1000
CHUNK = 50_000  # documents that are encoded, then searched


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", required=True, help="name of a folder below --beir_dir")
    add("--beir_dir", default="./", help="folder of the data sets")
    add("--split", default=None, help="judgements to use; by default test, and dev for msmarco")
    add("--lower_case", action="store_true", help="lowercase texts, after --normalize_text")
    add("--normalize_text", action="store_true", help="one form for dashes, quotation marks and the like")
    identical = "leave a document out of the results of the query that has the same id, as BEIR does"
    add("--ignore_identical_ids", type=bool_flag, default=True, help=identical)

    add = add_encoder_flags(parser)
    add("--per_gpu_batch_size", type=int, default=128, help="texts per forward pass")
    add("--text_maxlength", type=int, default=512, help="tokens; what is longer is cut")
    add("--score_function", default="dot", choices=("dot", "cos_sim"), help="cos_sim: the same as both --norm flags")
    add("--norm_query", action="store_true", help="divide the vectors of queries by their length")
    add("--norm_doc", action="store_true", help="divide the vectors of documents by their length")

    add = parser.add_argument_group("retriever").add_argument
    add("--retriever", default="dense", choices=("dense", "bm25", "hybrid"), help="hybrid: dense and BM25 together")
    add("--dense_weight", type=float, default=0.5, help="of the dense scores in hybrid, the rest is BM25's")
    add("--run", default=None, help="evaluate this file (TREC's format, or .jsonl of --save_results_path) instead")
    add("--rerank", default=None, help="folder or cached name of a cross-encoder that orders the best ones anew")
    add("--rerank_top", type=int, default=100, help="how many of each query")

    add = parser.add_argument_group("output").add_argument
    everywhere = "nDCG, MAP, recall and P over all judged queries; those that found nothing count 0, as in trec_eval -c"
    add("-c", "--complete", action="store_true", help=everywhere)
    add("--output_dir", default="./my_experiment", help="for <dataset>.json, metrics, and <dataset>.queries.jsonl")
    formats = "what was retrieved: .jsonl, .trec (of trec_eval), any other: torch.save of {query: {document: score}}"
    add("--save_results_path", default=None, help=formats)
    add = parser.add_argument_group("processes").add_argument  # of the old launcher; torchrun and srun need neither
    add("--local_rank", "--local-rank", type=int, default=-1, help="ignored: read from the environment")
    add("--main_port", type=int, default=-1, help="rendezvous port under srun")
    return parser


def eval_beir(args: argparse.Namespace) -> dict[str, float]:
    """Metrics in percent, on every rank."""
    check_minimum(args, per_gpu_batch_size=1, text_maxlength=3, rerank_top=1)
    if args.run is not None and args.model_name_or_path is not None:
        raise ValueError("--model_name_or_path has no effect with --run")
    check_weight(args.dense_weight)
    if args.main_port > 0:
        os.environ.setdefault("MASTER_PORT", str(args.main_port))
    device = distributed.init(device=args.device)
    normalized = args.score_function == "cos_sim" or (args.norm_query and args.norm_doc)
    stored = None if args.run is None else read_run(args.run)
    needs_encoder = stored is None and args.retriever != "bm25"
    retriever = load_encoder(args, device, normalized) if needs_encoder else None
    cross_encoder = CrossEncoder(args.rerank, device, args.allow_download) if args.rerank else None

    def retrieve(dataset: BeirDataset) -> Run:
        if stored is None:
            run = as_run(dataset, search_dataset(dataset, retriever, args), args.ignore_identical_ids)
        else:
            run = run_of(dataset, stored, args.ignore_identical_ids)
        if cross_encoder is None:
            return run
        how = args.lower_case, args.normalize_text
        queries = dict(zip(dataset.queries, clean(dataset.queries.values(), *how), strict=True))
        texts = dict(zip((d.id for d in dataset.documents), clean(document_texts(dataset), *how), strict=True))
        return rerank(run, queries, texts, cross_encoder, args.rerank_top, args.per_gpu_batch_size)

    folder = Path(args.beir_dir) / args.dataset
    split = args.split or ("dev" if args.dataset == "msmarco" else "test")
    read = read_beir if stored is None or cross_encoder else read_judgements
    metrics, runs, per_query = evaluate_folder(folder, split, retrieve, args.complete, read)
    if distributed.is_main_process():
        print(" ".join(f"{name}: {value:.1f}" for name, value in metrics.items()), flush=True)
        name = args.dataset.replace("/", "-")
        write_json(Path(args.output_dir) / f"{name}.json", metrics)
        lines = ({"query_id": query, **values} for query, values in of_all_parts(per_query))
        write_json_lines(Path(args.output_dir) / f"{name}.queries.jsonl", lines)
        if args.save_results_path:
            save_runs(Path(args.save_results_path), runs)
    distributed.barrier()
    return metrics


def search_dataset(dataset: BeirDataset, retriever: Retriever | None, args: argparse.Namespace) -> Answers:
    """The best documents by the retriever that the flags choose; one more than is kept, for the query's own."""
    how = args.lower_case, args.normalize_text
    texts, queries = clean(document_texts(dataset), *how), clean(dataset.queries.values(), *how)
    k = TOP_K + 1
    bm25 = BM25(texts) if args.retriever != "dense" else None
    if args.retriever == "bm25":
        return bm25.search(queries, k)
    cosine = args.score_function == "cos_sim"
    norms = args.norm_query or cosine, args.norm_doc or cosine
    length = retriever.length("--text_maxlength", args.text_maxlength)
    amp = retriever.amp(args.no_fp16)
    dense = dense_search(retriever, texts, queries, k, args.per_gpu_batch_size, length, *norms, amp)
    if args.retriever == "dense":
        return dense
    return fuse(dense, bm25.search(queries, k), k, args.dense_weight, all(norms), list(map(bm25.focus, queries)))


def document_texts(dataset: BeirDataset) -> list[str]:
    return [document.full_text() for document in dataset.documents]


def dense_search(
    retriever: Retriever,
    texts: list[str],
    queries: list[str],
    k: int = TOP_K + 1,
    batch_size: int = 128,
    max_length: int | None = None,
    normalize_queries: bool = False,
    normalize_documents: bool = False,
    amp: str = "fp32",
) -> Answers:
    """Exact search of all queries in all texts; every process encodes its share of the texts.

    Longest texts come first, so that a batch that does not fit the memory fails at once.
    """

    def encode(texts: list[str], normalize: bool, kind: str) -> Tensor:
        vectors = retriever.encode(texts, batch_size, max_length, normalize, amp, kind)
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise ValueError(f"the vector of {kind} {bad[0]} is not finite: the weights are damaged, or try --no_fp16")
        return torch.from_numpy(vectors).to(retriever.device)

    of_queries = encode(queries, normalize_queries, "query")
    order = np.argsort([-len(text) for text in texts], kind="stable")
    own = order[distributed.get_rank() :: distributed.get_world_size()]
    best = nothing_found(len(queries), k)
    for start in range(0, len(own), CHUNK):
        rows = own[start : start + CHUNK]
        block = encode([texts[row] for row in rows], normalize_documents, "passage")
        scores, found = nearest_neighbours(of_queries, block, min(k, len(block)))
        best = merge([best, (scores.cpu().numpy(), rows[found.cpu().numpy()])], k)
    return merge(distributed.all_gather_object(best), k)


def evaluate_folder(
    folder: Path,
    split: str,
    retrieve: Callable[[BeirDataset], Run],
    complete: bool = False,
    read: Callable[[Path, str], BeirDataset] = read_beir,
) -> tuple[dict[str, float], dict[str, Run], dict[str, PerQuery]]:
    """Metrics of a data set, or their means over the data sets in a folder; what was retrieved from each; and the
    metrics of each judged query in percent, 0 for those that found nothing.

    Args:
        complete: See :func:`contriever.beir.means`.
        read: Reads one data set.
    """
    parts = [folder]
    if not find_file(folder, QRELS, split):
        parts = sorted(part for part in folder.glob("*") if find_file(part, QRELS, split)) or parts
    metrics, runs, per_query = {}, {}, {}
    for part in parts:
        dataset = read(part, split)
        distributed.print_once("\n".join(dataset.describe()))
        run = runs[part.name] = retrieve(dataset)
        if empty := sum(not run.get(query) for query in dataset.qrels):
            told = "count 0 in all metrics" if complete else "are skipped by nDCG, MAP, recall and P"
            distributed.print_once(f"{dataset.name}: {empty} queries found nothing; they {told}")
        found = evaluate_queries(dataset.qrels, run)
        metrics[part.name] = means(found, len(dataset.qrels), complete)
        nothing = dict.fromkeys(metrics[part.name], 0.0)
        per_query[part.name] = {
            query: {name: 100 * value for name, value in found.get(query, nothing).items()} for query in dataset.qrels
        }
        if len(parts) > 1:
            distributed.print_once(f"{part.name}: NDCG@10 {metrics[part.name]['NDCG@10']:.1f}")
    names = metrics[parts[0].name]
    return {name: sum(m[name] for m in metrics.values()) / len(parts) for name in names}, runs, per_query


def as_run(dataset: BeirDataset, answers: Answers, ignore_identical_ids: bool = True) -> Run:
    """Query id to document id to score, at most ``TOP_K`` documents each."""
    run = {}
    for query, scores, rows in zip(dataset.queries, *answers, strict=True):
        found = [(dataset.documents[row].id, float(s)) for row, s in zip(rows, scores, strict=True) if row >= 0]
        kept = [(document, s) for document, s in found if document != query or not ignore_identical_ids]
        run[query] = dict(kept[:TOP_K])
    return run


def run_of(dataset: BeirDataset, stored: Run, ignore_identical_ids: bool = True) -> Run:
    """What a file says that was retrieved for the judged queries."""
    found = {query: stored.get(query, stored.get(f"{dataset.name}/{query}", {})) for query in dataset.qrels}
    if not ignore_identical_ids:
        return found
    if same := sum(query in scores for query, scores in found.items()):
        distributed.print_once(f"{dataset.name}: {same} queries have the id of a result, which is left out")
    return {query: {d: s for d, s in scores.items() if d != query} for query, scores in found.items()}


def of_all_parts(parts: dict[str, dict[str, dict]]) -> list[tuple[str, dict]]:
    """(query id, what belongs to it) of all data sets; queries of different ones may have the same id."""
    return [
        (query if len(parts) == 1 else f"{name}/{query}", found)
        for name, part in parts.items()
        for query, found in part.items()
    ]


def save_runs(path: Path, runs: dict[str, Run]) -> None:
    """What was retrieved, in the format that the ending of the file asks for."""
    queries = of_all_parts(runs)
    if ending(path) == ".jsonl":
        write_json_lines(path, ({"query_id": query, "results": scores} for query, scores in queries))
        return
    with replacing(path, "w" if ending(path) == ".trec" else "wb") as file:
        if ending(path) != ".trec":
            torch.save(dict(queries), file)
            return
        for query, scores in queries:
            for rank, (document, score) in enumerate(scores.items(), start=1):
                if len(f"{query} {document}".split()) != 2:
                    raise ValueError(f"{path}: TREC's format has no room for blanks in the ids {query!r}, {document!r}")
                file.write(f"{query} Q0 {document} {rank} {score!r} contriever\n")


def main() -> None:
    distributed.run_script(eval_beir, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
