"""Retrieval metrics of BEIR: nDCG, MAP, recall and precision by trec_eval, and BEIR's own MRR, R_cap and hole."""

from collections.abc import Iterable, Mapping

import pytrec_eval

K_VALUES = (1, 3, 5, 10, 100, 1000)
Run = Mapping[str, Mapping[str, float]]  # query id -> document id -> score
Qrels = Mapping[str, Mapping[str, int]]  # query id -> document id -> grade, 0: judged and not relevant


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
