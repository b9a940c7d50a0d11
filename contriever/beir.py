"""BEIR: its layout (corpus.jsonl, queries.jsonl, qrels/<split>.tsv) and its metrics.

nDCG, MAP, recall and precision are those of trec_eval; MRR, R_cap and hole are BEIR's own.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytrec_eval

from .index.passages import Passage
from .text.files import read_json_lines, read_lines, text_field

K_VALUES = (1, 3, 5, 10, 100, 1000)
Run = Mapping[str, Mapping[str, float]]  # query id -> document id -> score
Qrels = Mapping[str, Mapping[str, int]]  # query id -> document id -> grade, 0: judged and not relevant


@dataclass(frozen=True)
class BeirDataset:
    """A collection, and the queries (id to text) that have judgements."""

    name: str
    documents: list[Passage]
    queries: dict[str, str]
    qrels: Qrels

    def describe(self) -> list[str]:
        """One line on its size, and one on everything that could surprise."""
        ids = {document.id for document in self.documents}
        judged = {document for grades in self.qrels.values() for document in grades}
        counts = {
            "documents are empty": sum(not document.full_text().strip() for document in self.documents),
            "judged documents are not in the collection": len(judged - ids),
            "queries have the id of a document, which is left out of their results": len(ids & self.queries.keys()),
        }
        sizes = f"{self.name}: {len(self.documents)} documents, {len(self.queries)} judged queries"
        return [sizes, *(f"{self.name}: {count} {what}" for what, count in counts.items() if count)]


def read_beir(folder: str | Path, split: str = "test") -> BeirDataset:
    """Read one data set; mistakes in it are a ``ValueError`` that names file and line."""
    folder = Path(folder)
    files = [folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / f"{split}.tsv"]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{folder} is not in the layout of BEIR: there is no {', no '.join(missing)}")
    documents = {
        record_id: Passage(record_id, text_field(record, "title", where, ""), text_field(record, "text", where))
        for record_id, record, where in _with_ids(files[0])
    }
    queries = {record_id: text_field(record, "text", where) for record_id, record, where in _with_ids(files[1])}
    qrels = read_qrels(files[2])
    unknown = next((query for query in qrels if query not in queries), None)
    if unknown is not None:
        raise ValueError(f"{files[2]} judges the query {unknown!r}, which is not in {files[1]}")
    return BeirDataset(folder.name, list(documents.values()), {query: queries[query] for query in qrels}, qrels)


def _with_ids(path: Path) -> Iterator[tuple[str, dict, str]]:
    """(id, record, file and line) of every line; ids must differ."""
    seen = {}
    for where, record in read_json_lines(path):
        record_id = text_field(record, "_id", where)
        if record_id in seen:
            raise ValueError(f"{where}: the id {record_id!r} stands in {seen[record_id]} already")
        seen[record_id] = where
        yield record_id, record, where
    if not seen:
        raise ValueError(f"{path} is empty")


def read_qrels(path: Path) -> Qrels:
    """Judgements of a tab-separated file with a header: query id, document id, grade."""
    qrels = {}
    for number, (_, line) in enumerate(read_lines(path), start=1):
        columns = line.rstrip("\r\n").split("\t")
        is_judgement = len(columns) == 3 and columns[2].strip().lstrip("-").isdigit()
        if number == 1 and is_judgement:
            raise ValueError(f"{path}, line 1: expected a header (query-id, corpus-id, score), got a judgement")
        if number == 1 or not line.strip():
            continue
        if not is_judgement:
            raise ValueError(
                f"{path}, line {number}: expected query id, document id and an integer, got {line.rstrip()[:80]!r}"
            )
        query, document, grade = columns[0], columns[1], int(columns[2])
        # published collections repeat some lines; only a second opinion is a mistake
        before = qrels.setdefault(query, {}).setdefault(document, grade)
        if before != grade:
            raise ValueError(
                f"{path}, line {number}: document {document!r} is judged twice for query {query!r}: {before}, {grade}"
            )
    if not qrels:
        raise ValueError(f"{path} has no judgements")
    return qrels


# --- Metrics ----------------------------------------------------------------------------------------------------------


def evaluate_run(qrels: Qrels, run: Run, k_values: Iterable[int] = K_VALUES) -> dict[str, float]:
    """All metrics in percent, as ``{"NDCG@1": ..., "NDCG@3": ..., ...}``.

    nDCG (gain = grade, discount log2(rank + 1)), MAP, recall and P come from trec_eval, which orders equal scores by
    document id, descending; they are means over the judged queries that have results. MRR, R_cap (hits among the first
    k / min(k, relevant documents)) and Hole (share of the first k that nobody judged for any query) keep the order of
    ``run`` among equal scores, and are divided by the number of all judged queries. Every value is rounded to five
    decimals before it becomes a percentage.

    Raises:
        ValueError: If no query has both judgements and results.
    """
    k_values = sorted(k_values)
    run = {query: dict(scores) for query, scores in run.items() if query in qrels and scores}
    if not run:
        raise ValueError("no query has both relevance judgements and results")
    metrics = _trec_eval(qrels, run, k_values) | _beir_extras(qrels, run, k_values)
    return {name: 100 * round(value, 5) for name, value in metrics.items()}


def _trec_eval(qrels: Qrels, run: Run, k_values: list[int]) -> dict[str, float]:
    measures = {"NDCG": "ndcg_cut", "MAP": "map_cut", "Recall": "recall", "P": "P"}
    cuts = ",".join(map(str, k_values))
    evaluator = pytrec_eval.RelevanceEvaluator(
        {query: dict(grades) for query, grades in qrels.items()}, {f"{name}.{cuts}" for name in measures.values()}
    )
    per_query = evaluator.evaluate(run).values()
    return {
        f"{name}@{k}": sum(query[f"{measure}_{k}"] for query in per_query) / len(per_query)
        for name, measure in measures.items()
        for k in k_values
    }


def _beir_extras(qrels: Qrels, run: Run, k_values: list[int]) -> dict[str, float]:
    judged = {document for grades in qrels.values() for document in grades}
    totals = {f"{name}@{k}": 0.0 for name in ("MRR", "R_cap", "Hole") for k in k_values}
    for query, scores in run.items():
        ranking = sorted(scores, key=scores.get, reverse=True)[: k_values[-1]]
        relevant = {document for document, grade in qrels[query].items() if grade > 0}
        first = next((rank for rank, document in enumerate(ranking, start=1) if document in relevant), None)
        for k in k_values:
            best = ranking[:k]
            if first is not None and first <= k:
                totals[f"MRR@{k}"] += 1 / first
            if relevant:
                totals[f"R_cap@{k}"] += len(relevant.intersection(best)) / min(k, len(relevant))
            totals[f"Hole@{k}"] += sum(document not in judged for document in best) / k
    return {name: total / len(qrels) for name, total in totals.items()}
