"""What is measured while an encoder is trained: sentences that find their documents, and judged collections."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from shared.run.run import Run

from .beir_data import BeirDataset
from .encoder import Retriever
from .eval_beir import Answers, dense_search, document_texts, evaluate_folder, prepared
from .finetuning_data import FineTuningPairs, collate
from .sentence_recall import SentenceRecall
from .tokens import ChunkedText


class Evaluation:
    """Evaluations before training, every so many steps, and after it; every process does the same.

    Args:
        recall: Of documents of the training text; None: not measured.
        every_steps: 0: before and after training only.
        total_steps: Length of the training.
        norm_query, norm_doc: Divide vectors by their norms.
        batch_size: Texts at once.
        collections: Folders in BEIR's layout by name; their split ``test`` is searched.
        prepare: Cleans up their texts.

    Attributes:
        examples: Held-out questions of fine-tuning, None: there are none.
        disabled_reason: Why nothing is measured, where something was asked for; None otherwise.
    """

    def __init__(
        self,
        retriever: Retriever,
        recall: SentenceRecall | None,
        every_steps: int,
        total_steps: int,
        norm_query: bool,
        norm_doc: bool,
        batch_size: int,
        collections: dict[str, Path] | None = None,
        prepare: Callable[[str], str] = str,
    ):
        self.retriever, self.recall = retriever, recall
        self.collections, self.prepare = collections or {}, prepare
        self.every_steps, self.total_steps = every_steps, total_steps
        self.norm_query, self.norm_doc, self.batch_size = norm_query, norm_doc, batch_size
        self.examples: FineTuningPairs | None = None
        self.disabled_reason = recall.disabled_reason if recall else None

    @classmethod
    def of(cls, args: argparse.Namespace, retriever: Retriever, datasets: Sequence[ChunkedText]) -> "Evaluation":
        recall = None
        if getattr(args, "eval_documents", 0):
            documents = (document for dataset in datasets for document in dataset.documents())
            recall = SentenceRecall(documents, retriever.tokenizer, args.eval_documents, min(256, retriever.max_length))
        collections = {name: Path(args.eval_datasets_dir) / name for name in args.eval_datasets}
        for folder in collections.values():
            if not folder.is_dir():
                raise ValueError(f"--eval_datasets: there is no folder {folder}")

        cosine = args.score_function == "cos_sim"
        return cls(
            retriever,
            recall,
            args.eval_freq,
            args.total_steps,
            args.norm_query or cosine,
            args.norm_doc or cosine,
            args.per_gpu_eval_batch_size,
            collections,
            prepared(args.eval_normalize_text, args.lower_case),
        )

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after so many updates."""
        return step == self.total_steps or (self.every_steps > 0 and step % self.every_steps == 0)

    def run(self, encoder: nn.Module, run: Run) -> None:
        """Measure, and write a line of the run's log."""
        values = {}
        if self.recall is not None and not self.recall.disabled_reason:
            values |= self.recall.run(encoder, self.norm_query, self.norm_doc, min(64, self.batch_size))
        for name, folder in self.collections.items():
            metrics, _ = evaluate_folder(folder, "test", self._search)
            values |= {f"{name}/{metric}": metrics[metric] for metric in ("NDCG@10", "Recall@10", "Recall@100")}
        if self.examples is not None:
            values |= accuracy_and_mrr(encoder, self.examples, self.norm_query, self.norm_doc, self.batch_size)
        if values:
            run.log.evaluation(run.steps_done, run.epoch, **values)

    def _search(self, dataset: BeirDataset) -> Answers:
        texts, queries = ([*map(self.prepare, part)] for part in (document_texts(dataset), dataset.queries.values()))
        return dense_search(
            self.retriever,
            texts,
            queries,
            batch_size=self.batch_size,
            normalize_queries=self.norm_query,
            normalize_documents=self.norm_doc,
            amp="auto",
        )


@torch.inference_mode()
def accuracy_and_mrr(
    encoder: nn.Module, examples: FineTuningPairs, norm_query: bool, norm_doc: bool, batch_size: int
) -> dict[str, float]:
    """How well each question finds its positive among the passages of all questions, without temperature.

    Candidates are the first positive and the first negative of every question.

    Returns:
        ``eval_acc``: how often it is first, in percent; ``mrr``: mean of 1 / its rank.
    """
    was_training = encoder.training
    encoder.eval()
    device = next(encoder.parameters()).device
    questions, positives, negatives = [], [], []
    for start in range(0, len(examples), batch_size):
        items = [examples.evaluation_item(i) for i in range(start, min(start + batch_size, len(examples)))]
        batch = {
            name: value.to(device) for name, value in collate(items, examples.retriever, examples.max_length).items()
        }
        questions.append(encoder(batch["q_tokens"], batch["q_mask"], normalize=norm_query).float())
        passages = encoder(batch["k_tokens"], batch["k_mask"], normalize=norm_doc).float()
        positives.append(passages[: len(items)])
        negatives.append(passages[len(items) :])
    encoder.train(was_training)
    scores = torch.cat(questions) @ torch.cat([*positives, *negatives]).T
    own = scores.diagonal()[:, None]
    # equal scores in the order of the candidates: an encoder that gives one vector to every text finds nothing
    earlier = torch.arange(scores.shape[1], device=device) < torch.arange(len(scores), device=device)[:, None]
    ranks = 1 + ((scores > own) | ((scores == own) & earlier)).sum(dim=1)
    return {"eval_acc": 100 * (ranks == 1).float().mean().item(), "mrr": (1 / ranks).mean().item()}
