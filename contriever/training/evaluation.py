"""What is measured while an encoder is trained: sentences that find their documents, and judged collections."""

import argparse
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from shared.run.run import Run

from ..augmentations import Draws, SpecialTokens, add_bos_eos
from ..beir import BeirDataset
from ..encoder import Retriever, encode_tokens
from ..eval_beir import TOP_K, as_run, dense_search, document_texts, evaluate_folder
from ..text.normalize import clean
from ..text.tokens import ChunkedText
from .questions import FineTuningPairs

SENTENCE_ENDS = (".", "!", "?", "\u3002", "\u0964")  # the last two of Chinese and Japanese, of Hindi and Bengali
FEWEST, MOST = 6, 64  # tokens of a sentence that is asked for


class Evaluation:
    """Evaluations before training, every so many steps, and after it; every process does the same.

    Args:
        args: Flags of either training script.
        datasets: Training text, of which documents are to be found from one of their sentences.
        examples: Held-out questions of fine-tuning; None: there are none.

    Attributes:
        disabled_reason: Why nothing is measured, where something was asked for; None otherwise.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        retriever: Retriever,
        datasets: Sequence[ChunkedText] = (),
        examples: FineTuningPairs | None = None,
    ):
        self.args, self.retriever, self.examples = args, retriever, examples
        self.recall = None
        if datasets and args.eval_documents:
            documents = (document for dataset in datasets for document in dataset.documents())
            length = min(256, retriever.max_length)
            self.recall = SentenceRecall(documents, retriever.tokenizer, args.eval_documents, length)
        self.disabled_reason = self.recall.disabled_reason if self.recall else None
        self.collections = {name: Path(args.eval_datasets_dir) / name for name in args.eval_datasets}
        for folder in self.collections.values():
            if not folder.is_dir():
                raise ValueError(f"--eval_datasets: there is no folder {folder}")
        cosine = args.score_function == "cos_sim"
        self.norms = args.norm_query or cosine, args.norm_doc or cosine

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after so many updates."""
        return step == self.args.total_steps or (self.args.eval_freq > 0 and step % self.args.eval_freq == 0)

    def run(self, encoder: nn.Module, run: Run) -> None:
        """Measure, and write a line of the run's log."""
        with torch.compiler.set_stance("force_eager"):  # compiling for these sizes takes longer than what it saves
            values = self.measure(encoder)
        if values:
            run.log.evaluation(run.steps_done, run.epoch, **values)

    def measure(self, encoder: nn.Module) -> dict[str, float]:
        values, batch_size = {}, self.args.per_gpu_eval_batch_size
        if self.recall is not None and not self.disabled_reason:
            values |= self.recall.run(encoder, *self.norms, min(64, batch_size))
        for name, folder in self.collections.items():
            metrics, _, _ = evaluate_folder(folder, "test", self._retrieve)
            values |= {f"{name}/{metric}": metrics[metric] for metric in ("NDCG@10", "Recall@10", "Recall@100")}
        if self.examples is not None:
            values |= accuracy_and_mrr(encoder, self.examples, *self.norms, batch_size)
        return values

    def _retrieve(self, dataset: BeirDataset) -> dict[str, dict[str, float]]:
        how = self.args.lower_case, self.args.eval_normalize_text
        texts, queries = clean(document_texts(dataset), *how), clean(dataset.queries.values(), *how)
        batch_size = self.args.per_gpu_eval_batch_size
        found = dense_search(self.retriever, texts, queries, TOP_K + 1, batch_size, None, *self.norms, amp="auto")
        return as_run(dataset, found)


class SentenceRecall:
    """How well an encoder finds a document from one of its own sentences: a measure that needs no labels.

    One sentence is taken out of each document; it is the query, and what is left of the document is to be found among
    those of all others. An encoder that only compares exact words does well already, so read it as a difference between
    encoders on the same text.

    Args:
        documents: Token ids of one document after the other; those with fewer than three sentences are left out.
        most_documents: Take the first ones only.
        max_length: Tokens of a document that are read.
    """

    def __init__(self, documents: Iterable[np.ndarray], tokenizer, most_documents: int, max_length: int):
        special = SpecialTokens.of(tokenizer)
        vocabulary = tokenizer.get_vocab()
        ends = [vocabulary[mark] for mark in SENTENCE_ENDS if mark in vocabulary]
        self.pad_id, self.queries, self.documents = tokenizer.pad_token_id, [], []
        for number, document in enumerate(documents):
            if len(self.queries) == most_documents:
                break
            found = sentences(document[: max_length - 2], ends)
            if len(found) < 3:
                continue
            start, end = found[Draws.seeded(0, number).py.randrange(len(found))]
            rest = np.concatenate([document[:start], document[end : max_length - 2]])
            self.queries.append(add_bos_eos(document[start:end], special.bos, special.eos))
            self.documents.append(add_bos_eos(rest, special.bos, special.eos))
        self.disabled_reason = None if len(self.queries) > 1 else "no two documents of three sentences"

    def run(self, encoder: nn.Module, norm_query: bool, norm_doc: bool, batch_size: int = 64) -> dict[str, float]:
        """Share of the documents that are first, among the first ten, and first by a guess, in percent."""
        scores = self.search(encoder, norm_query, norm_doc, batch_size)
        ranks = (scores >= scores.diagonal()[:, None]).sum(axis=1)  # ties count against it: equal vectors find nothing
        return {f"recall_at_{k}": 100 * float((ranks <= k).mean()) for k in (1, 10)} | {
            "recall_chance": 100 / len(ranks)
        }

    def search(self, encoder: nn.Module, norm_query: bool, norm_doc: bool, batch_size: int = 64) -> np.ndarray:
        """Scores of all documents (columns) for all queries."""
        queries = encode_tokens(encoder, self.queries, self.pad_id, batch_size, norm_query)
        return queries @ encode_tokens(encoder, self.documents, self.pad_id, batch_size, norm_doc).T


def sentences(document: np.ndarray, ends: list[int]) -> list[tuple[int, int]]:
    """First and last + 1 token of the sentences of ``FEWEST`` to ``MOST`` tokens; ``ends``: tokens that end one."""
    borders = [0, *(np.flatnonzero(np.isin(document, ends)) + 1).tolist()]
    return [(a, b) for a, b in itertools.pairwise(borders) if FEWEST <= b - a <= MOST]


def accuracy_and_mrr(
    encoder: nn.Module, examples: FineTuningPairs, norm_query: bool, norm_doc: bool, batch_size: int
) -> dict[str, float]:
    """How often each question finds its positive first (in percent), and the mean of 1 / its rank.

    Candidates are the first positive and the first negative of every question.
    """
    tokens = examples.tokenize([examples.evaluation_item(i) for i in range(len(examples))])
    pad_id = examples.retriever.tokenizer.pad_token_id
    questions, passages = (
        encode_tokens(encoder, sequences, pad_id, batch_size, normalize)
        for sequences, normalize in zip(tokens, (norm_query, norm_doc), strict=True)
    )
    scores = questions @ passages.T
    own = scores.diagonal()[:, None]
    # equal scores in the order of the candidates: an encoder that gives one vector to every text finds nothing
    earlier = np.arange(scores.shape[1]) < np.arange(len(scores))[:, None]
    ranks = 1 + ((scores > own) | ((scores == own) & earlier)).sum(axis=1)
    return {"eval_acc": 100 * float((ranks == 1).mean()), "mrr": float((1 / ranks).mean())}
