"""Find hard negatives: passages that look like an answer to a question and are not among its positives.

    python mine_negatives.py --data train.jsonl --passages passages.tsv --output_path train_hard.jsonl
    python mine_negatives.py --beir my_collection --split train --output_path train_hard.jsonl
    python mine_negatives.py --data train.jsonl --passages passages.tsv --output_path train_hard.jsonl \\
        --method dense --model_name_or_path finetuned/encoder

``bm25`` ranks passages by shared words, ``dense`` by an encoder, such as the one that was fine-tuned with random
negatives before (section 4.4). The output is what ``finetuning.py`` reads.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contriever.augmentations import Draws
from contriever.beir import read_beir
from contriever.eval_beir import dense_search
from contriever.flags import add_encoder_flags, check_minimum, load_encoder
from contriever.index.bm25 import BM25
from contriever.index.passages import Passage, PassageFile
from contriever.text.answers import has_answer
from contriever.text.files import write_json_lines
from contriever.training.questions import read_examples
from shared import distributed
from shared.run.flags import Parser


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", nargs="+", default=[], help="questions with positive_ctxs, as finetuning.py reads them")
    add("--passages", default=None, help=".tsv or .jsonl file of the passages to choose from")
    add("--beir", default=None, help="instead of both: a folder in BEIR's layout")
    add("--split", default="train", help="of its judgements; positive are those above 0")
    add("--output_path", required=True, help=".jsonl file with negative_ctxs and hard_negative_ctxs added")
    add("--method", default="bm25", choices=("bm25", "dense"), help="what ranks passages")
    add("--hard_negatives", type=int, default=30, help="per question, best first")
    add("--random_negatives", type=int, default=10, help="per question, drawn from all passages")
    add("--skip_top", type=int, default=0, help="leave out so many of the best: they may be unmarked positives")
    add("--seed", type=int, default=0, help="of the random negatives")

    add = add_encoder_flags(parser)
    add("--norm", action="store_true", help="compare vectors of length 1")
    add("--passage_maxlength", type=int, default=None, help="most tokens; by default as many as the encoder reads")
    add("--per_gpu_batch_size", type=int, default=64, help="texts at once")
    return parser


def read_questions_and_passages(args: argparse.Namespace) -> tuple[list[dict], list[Passage]]:
    """Records with ``question`` and ``positive_ctxs``, and all passages."""
    if args.beir is not None:
        if args.data or args.passages is not None:
            raise ValueError("--beir takes the place of --data and --passages: give one or the other")
        dataset = read_beir(args.beir, args.split)
        contexts = {passage.id: vars(passage) for passage in dataset.documents}
        records = []
        for query, text in dataset.queries.items():
            relevant = [contexts[i] for i, grade in dataset.qrels[query].items() if grade > 0 and i in contexts]
            if relevant:
                records.append({"question": text, "positive_ctxs": relevant})
        return records, dataset.documents
    if not args.data or args.passages is None:
        raise ValueError("give --data and --passages, or --beir")
    return read_examples(args.data), list(PassageFile(args.passages).read())


def rank_passages(args: argparse.Namespace, questions: Sequence[str], texts: Sequence[str], k: int) -> np.ndarray:
    """Rows of the k best passages of each question, (Q, k) int64, best first; -1 where there are fewer."""
    if args.method == "bm25":
        return BM25(texts).search(questions, k)[1]
    device = distributed.init(device=args.device)
    retriever = load_encoder(args, device, normalized=True)
    if retriever.normalized and not args.norm:
        raise ValueError(f"{retriever.origin} was trained on vectors of length 1: give --norm")
    length, amp = args.passage_maxlength, "fp32" if args.no_fp16 else "auto"
    return dense_search(retriever, texts, questions, k, args.per_gpu_batch_size, length, args.norm, args.norm, amp)[1]


def is_positive(passage: Passage, record: dict) -> bool:
    """Whether a passage is one of the positives, or holds one of the record's ``answers``, where it has any."""
    for positive in record["positive_ctxs"]:
        if passage.text == positive["text"] or (positive.get("id") is not None and str(positive["id"]) == passage.id):
            return True
    return has_answer(record.get("answers", []), passage.text)


def with_negatives(
    record: dict, ranked: Sequence[int], passages: Sequence[Passage], hard: int, plain: int, skip: int, draws: Draws
) -> dict:
    """The record with ``hard_negative_ctxs``, best first, and ``negative_ctxs``, drawn at random."""
    candidates = (passages[row] for row in ranked[skip:] if row >= 0)
    hard_ones = [vars(passage) for passage in candidates if not is_positive(passage, record)][:hard]
    taken, random_ones = {passage["id"] for passage in hard_ones}, []
    for row in draws.py.sample(range(len(passages)), min(len(passages), 2 * plain + 10)):
        passage = passages[row]
        if len(random_ones) < plain and passage.id not in taken and not is_positive(passage, record):
            random_ones.append(vars(passage))
    return {**record, "negative_ctxs": random_ones, "hard_negative_ctxs": hard_ones}


def mine(args: argparse.Namespace) -> None:
    """Rank the passages for every question and write the records."""
    check_minimum(args, hard_negatives=0, random_negatives=0, skip_top=0, per_gpu_batch_size=1, passage_maxlength=3)
    if args.method == "bm25" and (args.model_name_or_path is not None or args.norm):
        raise ValueError("--model_name_or_path and --norm have no effect on --method bm25")
    records, passages = read_questions_and_passages(args)
    if not records:
        raise ValueError("there is no question with a positive")
    most_positives = max(len(record["positive_ctxs"]) for record in records)
    k = args.hard_negatives + args.skip_top + most_positives
    k += k if any(record.get("answers") for record in records) else 0  # further ones hold an answer
    texts = [passage.full_text() for passage in passages]
    ranked = rank_passages(args, [record["question"] for record in records], texts, k)
    counts = args.hard_negatives, args.random_negatives, args.skip_top
    mined = [
        with_negatives(record, rows, passages, *counts, Draws.seeded(args.seed, number))
        for number, (record, rows) in enumerate(zip(records, ranked.tolist(), strict=True))
    ]
    write_json_lines(Path(args.output_path), mined)
    found = sum(len(record["hard_negative_ctxs"]) for record in mined) / len(mined)
    print(f"{args.output_path}: {len(mined)} questions, {found:.1f} hard negatives each, by {args.method}")


def main() -> None:
    with distributed.clean_exit():
        mine(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
