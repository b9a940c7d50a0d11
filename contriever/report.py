"""The text at the end of a run: what was learned, where the files are, what to do next."""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from shared.run.log import read_log
from shared.run.settings import long_warmup, more_than_data, slow_average, tell_settings
from shared.run.summary import command, paragraphs

from .encoder import load_retriever
from .training.checkpoints import start_retriever
from .training.evaluation import SentenceRecall
from .training.pairs import open_datasets

DOCUMENTS, HITS = 100, 12  # searched for the page, and shown there


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


def summary(output_dir: Path, normalized: bool, fill_steps: int | None) -> str:
    """What a run has left.

    Args:
        normalized: Whether vectors were divided by their norms.
        fill_steps: After so many steps the queue of MoCo holds keys only; None without a queue.
    """
    lines = read_log(output_dir / "metrics.jsonl")
    losses = [line for line in lines if line.get("loss") is not None]
    recalls = [line for line in lines if "recall_at_1" in line]
    result = [", ".join(f"loss {line['loss']:.3f} at step {line['step']}" for line in (*losses[:1], *losses[1:][-1:]))]
    if fill_steps is not None:
        result.append(
            f"the queue begins with random vectors: the loss rises until keys have filled it, at step {fill_steps}"
        )
    for k in (1, 10):
        if len(recalls) > 1:
            before, after = recalls[0], recalls[-1]
            result.append(
                f"a document from one of its own sentences, among the first {k}: "
                f"{before[f'recall_at_{k}']:.1f} % before, {after[f'recall_at_{k}']:.1f} % after"
            )
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
        "Next": [query, f"{evaluation} --norm_query --norm_doc" if normalized else evaluation],
    }
    return paragraphs(blocks)


def page_tables(folder: Path, flags: Mapping) -> list[dict]:
    """What the first and the trained encoder find for sentences that were taken out of training documents."""
    args = argparse.Namespace(**flags)
    datasets = open_datasets(args.train_data, args.loading_mode, args.chunk_length, args.chunks == "document")
    documents = (document for dataset in datasets.values() for document in dataset.documents())
    before, after = start_retriever(args, torch.device("cpu")), load_retriever(folder)
    task = SentenceRecall(documents, after.tokenizer, DOCUMENTS, min(256, after.max_length))
    if task.disabled_reason:
        return []
    found = [task.search(retriever.model, args.norm_query, args.norm_doc) for retriever in (before, after)]
    ranks = [(scores >= scores.diagonal()[:, None]).sum(axis=1) for scores in found]
    changed = np.flatnonzero(ranks[0] != ranks[1])
    decode = partial(after.tokenizer.decode, skip_special_tokens=True)
    cells = []
    for i in changed[:HITS]:
        first = [decode(task.documents[scores[i].argmax()])[:160] for scores in found]
        cells.append([decode(task.queries[i]), *(f"{rank[i]}: {hit}" for rank, hit in zip(ranks, first, strict=True))])
    better = int((ranks[1] < ranks[0]).sum())
    note = (
        f"Each query is a sentence taken out of one of {len(task.queries)} documents; the number is the rank of its "
        f"own document, the text the beginning of the first hit. {better} ranks became better and "
        f"{len(changed) - better} worse; the first {len(cells)} of these are shown."
    )
    columns = ["query", "before", "after"]
    return [{"title": "Queries and hits", "short": "Hits", "note": note, "columns": columns, "rows": cells}]
