"""The text at the end of a run: what was learned, where the files are, what to do next."""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from shared.run.log import read_log
from shared.run.settings import long_warmup, more_than_data, slow_average, tell_settings
from shared.run.summary import accuracy, command, paragraphs

from .encoder import load_retriever
from .training.checkpoints import start_retriever
from .training.evaluation import SentenceRecall
from .training.pairs import open_datasets

DOCUMENTS, HITS = 100, 12  # searched for the summary and the page, and shown there


def tell_unsuitable_settings(args: argparse.Namespace, num_chunks: int, batch_size: int) -> None:
    """Print which settings make no sense for so little text; ``batch_size`` is that of all processes together."""
    tell_settings(args, long_warmup("--warmup_steps", args.warmup_steps, args.total_steps, "steps"))
    if args.contrastive_mode == "moco":
        queue = max(1, num_chunks // 2 // batch_size) * batch_size
        tell_settings(
            args,
            slow_average("--momentum", np.full(args.total_steps, args.momentum), "key encoder"),
            more_than_data("--queue_size", args.queue_size, num_chunks, queue, "chunks of text"),
        )


def summary(output_dir: Path, args: argparse.Namespace, fill_steps: int | None) -> str:
    """What a run has left.

    Args:
        fill_steps: After so many steps the queue of MoCo holds keys only; None without a queue.
    """
    lines = read_log(output_dir / "metrics.jsonl")
    losses = [line for line in lines if line.get("loss") is not None]
    recalls = [line for line in lines if "recall_chance" in line]  # logs of earlier versions lack it
    result = [", ".join(f"loss {line['loss']:.3f} at step {line['step']}" for line in (*losses[:1], *losses[1:][-1:]))]
    if fill_steps is not None:
        result.append(
            f"the queue begins with random vectors: the loss rises until keys have filled it, at step {fill_steps}"
        )
    for first in (1, 10) if len(recalls) > 1 else ():
        what = f"a document from one of its own sentences, among the first {first}"
        asked = round(100 / recalls[0]["recall_chance"])
        options = {"num_images": asked, "num_classes": max(1, asked / first), "start": "the first weights"}
        result += accuracy(recalls, f"recall_at_{first}", what, **options)
    for query, *answers in compare_hits(output_dir, args)[1][:1] if len(recalls) > 1 else ():
        result.append(f"a query: {query}")
        for when, (rank, hit) in zip(("before", "after"), answers, strict=True):
            result.append(f"  {when}: its document is hit {rank}, the first one begins: {hit[:80]}")
    encoder = output_dir / "encoder"
    collection = {"beir_dir": "YOUR_FOLDER", "dataset": "YOUR_COLLECTION"}
    evaluation = command("contriever/eval_beir.py", model_name_or_path=encoder, **collection)
    question = {"passages": "YOUR_FOLDER_OF_TEXTS", "query": "YOUR QUESTION"}
    query = command("contriever/search.py", model_name_or_path=encoder, **question)
    blocks = {
        "Result": result,
        "Files": [
            f"{encoder} (encoder and tokenizer in the layout of Hugging Face)",
            f"{output_dir / 'checkpoint.pth'} (the same command resumes from it)",
            f"{output_dir / 'metrics.jsonl'} (every few steps)",
        ],
        "Next": [query, f"{evaluation} --norm_query --norm_doc" if args.norm_query and args.norm_doc else evaluation],
    }
    return paragraphs(blocks)


def compare_hits(folder: Path, args: argparse.Namespace) -> tuple[int, list[tuple[str, tuple, tuple]]]:
    """How many sentences of training documents are searched for, and those whose document has another rank than with
    the first encoder: the sentence, and its rank and the first hit before and after; first those of rank 1 now."""
    datasets = open_datasets(args.train_data, args.loading_mode, args.chunk_length, args.chunks == "document")
    documents = (document for dataset in datasets.values() for document in dataset.documents())
    before, after = start_retriever(args, torch.device("cpu")), load_retriever(folder)
    task = SentenceRecall(documents, after.tokenizer, DOCUMENTS, min(256, after.max_length))
    if task.disabled_reason:
        return 0, []
    found = [task.search(retriever.model, args.norm_query, args.norm_doc) for retriever in (before, after)]
    decode = partial(after.tokenizer.decode, skip_special_tokens=True)

    def answer(scores: np.ndarray, i: int) -> tuple[int, str]:
        return int((scores[i] >= scores[i, i]).sum()), decode(task.documents[scores[i].argmax()])

    answers = [(decode(query), *(answer(scores, i) for scores in found)) for i, query in enumerate(task.queries)]
    changed = [row for row in answers if row[1][0] != row[2][0]]
    return len(task.queries), sorted(changed, key=lambda row: (row[2][0] > 1, row[2][0] - row[1][0]))


def page_tables(folder: Path, flags: Mapping) -> list[dict]:
    """Queries and hits before and after the training."""
    asked, changed = compare_hits(folder, argparse.Namespace(**flags))
    if not asked:
        return []
    better = sum(after < before for _, (before, _), (after, _) in changed)
    note = (
        f"Each query is a sentence taken out of one of {asked} documents; the number is the rank of its own document, "
        f"the text the beginning of the first hit. {better} ranks became better and {len(changed) - better} worse; "
        "shown are those that are first now, and then the largest gains."
    )
    rows = [[query, *(f"{rank}: {hit[:160]}" for rank, hit in answers)] for query, *answers in changed[:HITS]]
    columns = ["query", "before", "after"]
    return [{"title": "Queries and hits", "short": "Hits", "note": note, "columns": columns, "rows": rows}]
