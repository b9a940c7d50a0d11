"""The text at the end of a run: what was learned, where the files are, what to do next."""

import argparse
from pathlib import Path

import numpy as np

from shared.run.log import read_log
from shared.run.settings import long_warmup, more_than_data, slow_average, tell_settings
from shared.run.summary import command, paragraphs


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
