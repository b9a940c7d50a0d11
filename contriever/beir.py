"""BEIR: its layout (corpus.jsonl, queries.jsonl, qrels/<split>.tsv), TREC's and MS MARCO's files, and the metrics.

nDCG, MAP, recall and precision are those of trec_eval; MRR, R_cap and hole are BEIR's own.
"""

import html
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytrec_eval

from .index.passages import Passage, id_field, read_columns, read_passages
from .text.files import ending, find_packed, read_json_lines, read_lines, text_field

K_VALUES = (1, 3, 5, 10, 100, 1000)
Run = Mapping[str, Mapping[str, float]]  # query id -> document id -> score
Qrels = Mapping[str, Mapping[str, int]]  # query id -> document id -> grade, 0: judged and not relevant
PerQuery = dict[str, dict[str, float]]  # query id -> metric -> value
Record = TypeVar("Record")

# Files of a data set, the first name that is there; each may end in .gz
CORPUS = ("corpus.jsonl", "collection.tsv")
QUERIES = ("queries.jsonl", "queries.{split}.tsv", "topics.{split}.txt")
QRELS = ("qrels/{split}.tsv", "qrels.{split}.tsv", "qrels.{split}.txt")
OF_TREC_EVAL = {"NDCG": "ndcg_cut", "MAP": "map_cut", "Recall": "recall", "P": "P"}  # our names, and its own


@dataclass(frozen=True)
class BeirDataset:
    """A collection, and the queries (id to text) that have judgements."""

    name: str
    documents: list[Passage]
    queries: dict[str, str]
    qrels: Qrels

    def describe(self) -> list[str]:
        """One line on its size, and one on everything that could surprise."""
        if not self.documents:
            return [f"{self.name}: {len(self.qrels)} judged queries"]
        ids = {document.id for document in self.documents}
        judged = {document for grades in self.qrels.values() for document in grades}
        counts = {
            "documents are empty": sum(not document.full_text().strip() for document in self.documents),
            "judged documents are not in the collection": len(judged - ids),
            "queries have the id of a document, which is left out of their results": len(ids & self.queries.keys()),
        }
        sizes = f"{self.name}: {len(self.documents)} documents, {len(self.queries)} judged queries"
        return [sizes, *(f"{self.name}: {count} {what}" for what, count in counts.items() if count)]


def find_file(folder: Path, names: Iterable[str], split: str = "") -> Path | None:
    """The first file of these names that is in the folder, perhaps compressed."""
    found = (find_packed(folder / name.format(split=split)) for name in names)
    return next(filter(None, found), None)


def read_beir(folder: str | Path, split: str = "test") -> BeirDataset:
    """Read one data set; mistakes in it are a ``ValueError`` that names file and line."""
    corpus, queries, judgements = _files(folder, split, CORPUS, QUERIES, QRELS)
    passages = ((f"{corpus}, line {number}", p.id, p) for _, number, p in read_passages(corpus))
    documents = by_id(corpus, passages)
    texts = by_id(queries, read_queries(queries))
    qrels = read_qrels(judgements)
    unknown = next((query for query in qrels if query not in texts), None)
    if unknown is not None:
        raise ValueError(f"{judgements} judges the query {unknown!r}, which is not in {queries}")
    return BeirDataset(Path(folder).name, list(documents.values()), {query: texts[query] for query in qrels}, qrels)


def read_judgements(folder: str | Path, split: str = "test") -> BeirDataset:
    """Of a data set the judgements alone."""
    return BeirDataset(Path(folder).name, [], {}, read_qrels(*_files(folder, split, QRELS)))


def _files(folder: str | Path, split: str, *wanted: tuple[str, ...]) -> list[Path]:
    files = [find_file(Path(folder), names, split) for names in wanted]
    missing = [f"{folder}/{n[0].format(split=split)}" for n, file in zip(wanted, files, strict=True) if file is None]
    if missing:
        raise ValueError(f"{folder} is not in the layout of BEIR: there is no {', no '.join(missing)}")
    return files


def by_id(path: str | Path, records: Iterable[tuple[str, str, Record]]) -> dict[str, Record]:
    """Records by their ids, which must differ; each comes with file and line, and id."""
    seen, found = {}, {}
    for where, record_id, record in records:
        if record_id in seen:
            raise ValueError(f"{where}: the id {record_id!r} stands in {seen[record_id]} already")
        seen[record_id], found[record_id] = where, record
    if not seen:
        raise ValueError(f"{path} is empty")
    return found


def read_queries(path: Path) -> Iterator[tuple[str, str, str]]:
    """(file and line, id, text) of a .jsonl file, of lines with a tab between id and text, or of TREC's topics."""
    if ending(path) == ".jsonl":
        for where, record in read_json_lines(path):
            yield where, id_field(record, where), text_field(record, "text", where)
    elif next((line for _, line in read_lines(path) if line.strip()), "").lstrip().startswith("<"):
        yield from _topics(path)
    else:
        for _, number, (query, text) in read_columns(path, 2):
            yield f"{path}, line {number}", query, text


def _topics(path: Path) -> Iterator[tuple[str, str, str]]:
    """Of ``<top>`` with ``<num>`` and ``<title>``, or of ``<topic number="...">`` with ``<title>`` or ``<query>``."""
    content = "".join(line for _, line in read_lines(path))
    topics = re.findall(r"<top(?:ic\b([^>]*))?>(.*?)(?=<top(?:ic\b[^>]*)?>|\Z)", content, re.S | re.I)
    for count, (attributes, body) in enumerate(topics, start=1):
        number = re.search(r"\bnumber\s*=\s*[\"']([^\"']+)", attributes, re.I)
        number = number or re.search(r"<num>\s*(?:Number:)?\s*([^\s<]+)", body, re.I)
        title = re.search(r"<(?:title|query)>\s*(?:Topic:)?([^<]*)", body, re.I)
        if not number or not title:
            raise ValueError(f"{path}, topic {count}: no {'title' if number else 'number'}")
        yield f"{path}, topic {count}", number[1], " ".join(html.unescape(title[1]).split())


def read_qrels(path: Path) -> Qrels:
    """Judgements: BEIR's, with a header, then query id, document id and grade between tabs; or trec_eval's, without one
    and with another column, which counts for nothing, after the query id."""
    qrels, _, first = {}, *next(read_lines(path), (0, ""))
    of_trec = _is_judgement(first.split(), 4) and not _is_judgement(first.split("\t"), 3)
    if _is_judgement(first.split("\t"), 3):
        raise ValueError(f"{path}, line 1: expected a header (query-id, corpus-id, score), got a judgement")
    for number, (_, line) in enumerate(read_lines(path), start=1):
        if (number == 1 and not of_trec) or not line.strip():
            continue
        columns = line.split() if of_trec else line.rstrip("\r\n").split("\t")
        if not _is_judgement(columns, 4 if of_trec else 3):
            raise ValueError(
                f"{path}, line {number}: expected query id,{' 0,' if of_trec else ''} document id and an integer, got "
                f"{line.rstrip()[:80]!r}"
            )
        query, *_, document, grade = columns
        grade = int(grade)
        # published collections repeat some lines; only a second opinion is a mistake
        before = qrels.setdefault(query, {}).setdefault(document, grade)
        if before != grade:
            raise ValueError(
                f"{path}, line {number}: document {document!r} is judged twice for query {query!r}: {before}, {grade}"
            )
    if not qrels:
        raise ValueError(f"{path} has no judgements")
    return qrels


def _is_judgement(columns: list[str], count: int) -> bool:
    return len(columns) == count and columns[-1].strip().lstrip("-").isdigit()


def read_run(path: str | Path) -> Run:
    """What was retrieved: lines of trec_eval (query id, Q0, document id, rank, score, name), of which ids and score
    count, or the .jsonl file that ``eval_beir.py`` writes."""
    run = {}
    for where, query, document, score in _retrieved(Path(path)):
        try:
            score = float(score)
        except (ValueError, TypeError):
            score = math.nan
        if not math.isfinite(score):
            raise ValueError(f"{where}: the score of document {document!r} is no number")
        results = run.setdefault(query, {})
        if document in results:
            raise ValueError(f"{where}: document {document!r} is there twice for query {query!r}")
        results[document] = score
    if not run:
        raise ValueError(f"{path} holds no results")
    return run


def _retrieved(path: Path) -> Iterator[tuple[str, str, str, str | float]]:
    if ending(path) == ".jsonl":
        for where, record in read_json_lines(path):
            results = record.get("results")
            if not isinstance(results, dict):
                raise ValueError(f'{where}: "results" should be an object of documents and scores')
            query = text_field(record, "query_id", where)
            yield from ((where, query, document, score) for document, score in results.items())
        return
    for number, (_, line) in enumerate(read_lines(path), start=1):
        columns = line.split()
        if len(columns) != 6 and columns:
            raise ValueError(
                f"{path}, line {number}: expected query id, Q0, document id, rank, score and name, got "
                f"{line.rstrip()[:80]!r}"
            )
        if columns:
            yield f"{path}, line {number}", columns[0], columns[2], columns[4]


# --- Metrics ----------------------------------------------------------------------------------------------------------


def evaluate_queries(qrels: Qrels, run: Run, k_values: Iterable[int] = K_VALUES) -> PerQuery:
    """All metrics, in [0, 1], of every judged query that has results.

    nDCG (gain = grade, discount log2(rank + 1)), MAP, recall and P come from trec_eval, which orders equal scores by
    document id, descending. MRR, R_cap (hits among the first k / min(k, relevant documents)) and Hole (share of the
    first k that nobody judged for any query) keep the order of ``run`` among equal scores.
    """
    k_values = sorted(k_values)
    run = {query: dict(scores) for query, scores in run.items() if query in qrels and scores}
    cuts = ",".join(map(str, k_values))
    evaluator = pytrec_eval.RelevanceEvaluator(
        {query: dict(grades) for query, grades in qrels.items()}, {f"{name}.{cuts}" for name in OF_TREC_EVAL.values()}
    )
    found = evaluator.evaluate(run)
    judged = {document for grades in qrels.values() for document in grades}
    return {
        query: {f"{name}@{k}": found[query][f"{of}_{k}"] for name, of in OF_TREC_EVAL.items() for k in k_values}
        | _beir_extras(qrels[query], scores, k_values, judged)
        for query, scores in run.items()
    }


def means(per_query: PerQuery, judged: int, complete: bool = False) -> dict[str, float]:
    """In percent; every value is rounded to five decimals before it becomes a percentage.

    Those of trec_eval are means over the queries that have results, or, if ``complete`` (``trec_eval -c``), over all
    ``judged`` queries, as those of MRR, R_cap and Hole always are.

    Raises:
        ValueError: If no query has both judgements and results.
    """
    if not per_query:
        raise ValueError("no query has both relevance judgements and results")
    metrics = {}
    for name in next(iter(per_query.values())):
        of_found = name.split("@")[0] in OF_TREC_EVAL and not complete
        total = sum(values[name] for values in per_query.values())
        metrics[name] = 100 * round(total / (len(per_query) if of_found else judged), 5)
    return metrics


def _beir_extras(
    grades: Mapping[str, int], scores: Mapping[str, float], k_values: list[int], judged: set[str]
) -> dict[str, float]:
    ranking = sorted(scores, key=scores.get, reverse=True)[: k_values[-1]]
    relevant = {document for document, grade in grades.items() if grade > 0}
    first = next((rank for rank, document in enumerate(ranking, start=1) if document in relevant), math.inf)
    metrics = {f"MRR@{k}": 1 / first if first <= k else 0.0 for k in k_values}
    for k in k_values:
        hits = len(relevant.intersection(ranking[:k]))
        metrics[f"R_cap@{k}"] = hits / min(k, len(relevant)) if relevant else 0.0
    for k in k_values:
        metrics[f"Hole@{k}"] = sum(document not in judged for document in ranking[:k]) / k
    return metrics
