"""Cross-encoders of sentence-transformers: they read a query together with a document, and order the best ones anew."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from shared import distributed
from shared.run.packages import need_packages


class CrossEncoder:
    """One score for a query and a document.

    Args:
        name_or_path: Folder, or name of a model in the local cache of Hugging Face.
        allow_download: Ask the hub for a name that is not in the cache.
    """

    def __init__(self, name_or_path: str, device: torch.device | str = "cpu", allow_download: bool = False):
        need_packages("--rerank", sentence_transformers="-e '.[rerank]'")
        import sentence_transformers

        options = {"device": str(device), "local_files_only": not allow_download}
        try:
            self.name, self.model = name_or_path, sentence_transformers.CrossEncoder(name_or_path, **options)
        except OSError as error:
            hint = f": {error}" if allow_download else "; --allow_download asks the hub for it"
            raise ValueError(
                f"--rerank {name_or_path} is neither the folder of a model nor one in the local cache{hint}"
            ) from error

    def scores(self, query: str, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Of each text, before any sigmoid: it would make large scores equal."""
        pairs = [(query, text) for text in texts]
        options = {"batch_size": batch_size, "show_progress_bar": False, "activation_fn": torch.nn.Identity()}
        scores = np.asarray(self.model.predict(pairs, **options))
        if scores.ndim != 1:
            raise ValueError(f"--rerank {self.name} gives {scores.shape[1]} scores per document: it is a classifier")
        return scores


def rerank(
    run: Mapping[str, Mapping[str, float]],
    queries: Mapping[str, str],
    texts: Mapping[str, str],
    cross_encoder: CrossEncoder,
    top: int = 100,
    batch_size: int = 32,
) -> dict[str, dict[str, float]]:
    """The best ``top`` documents of each query in the order of a cross-encoder, then the others as they were.

    The scores are the cross-encoder's; those of the others are shifted, so that the best of them is 1 below the worst.
    Every process scores its share of the queries.

    Args:
        run: Query id to document id to score.
        queries: Texts by id.
        texts: Of the documents, by id.
    """
    rankings = {query: sorted(scores, key=scores.get, reverse=True) for query, scores in run.items()}
    own = {}
    for query in list(run)[distributed.get_rank() :: distributed.get_world_size()]:
        best = rankings[query][:top]
        unknown = next((document for document in best if document not in texts), None)
        if unknown is not None:
            raise ValueError(f"--rerank: the document {unknown!r} of query {query!r} is not in the collection")
        scores = cross_encoder.scores(queries[query], [texts[d] for d in best], batch_size) if best else []
        own[query] = {best[i]: float(scores[i]) for i in np.argsort(-np.asarray(scores), kind="stable")}
    scored = {query: found for part in distributed.all_gather_object(own) for query, found in part.items()}
    reranked = {}
    for query, ranking in rankings.items():
        rest = ranking[top:]
        shift = min(scored[query].values()) - 1 - run[query][rest[0]] if rest else 0.0
        reranked[query] = scored[query] | {document: run[query][document] + shift for document in rest}
    return reranked
