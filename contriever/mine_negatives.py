"""Find hard negatives: passages that look like an answer to a question and are not among its positives.

    python mine_negatives.py --data train.jsonl --passages passages.tsv --output_path train_hard.jsonl
    python mine_negatives.py --beir my_collection --split train --output_path train_hard.jsonl
    python mine_negatives.py --data train.jsonl --passages passages.tsv --output_path train_hard.jsonl \\
        --method dense --model_name_or_path finetuned/encoder

``bm25`` ranks passages by shared words, ``dense`` by an encoder, such as the one that was fine-tuned with random
negatives before (section 4.4). The output is what ``finetuning.py`` reads.

A passage that scores as much as a positive may be one that nobody marked. With ``--margin M`` and ``--relative_margin
R`` a hard negative n has s(n) <= s(p) - M - R |s(p)|, where p is the positive of the question with the lowest score s.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np

from contriever.augmentations import Draws
from contriever.beir import read_beir
from contriever.eval_beir import dense_search
from contriever.flags import add_encoder_flags, check_minimum, load_encoder
from contriever.index.answers import Answers
from contriever.index.bm25 import BM25
from contriever.index.passages import Passage, PassageFile
from contriever.text.answers import has_answer
from contriever.text.files import titled, write_json_lines
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
    add("--margin", type=float, default=None, help="by which hard negatives score less than every positive")
    add("--relative_margin", type=float, default=None, help="the same as a share of the positive's score")
    looked_at = "best passages per question that are looked at; None: enough, and ten times as many with a margin"
    add("--candidates", type=int, default=None, help=looked_at)
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


def rank_passages(
    args: argparse.Namespace, questions: Sequence[str], texts: Sequence[str], k: int, positives: Sequence[Sequence[str]]
) -> tuple[Answers, list[float]]:
    """The k best passages of each question, and the lowest score of its positives (none without ``positives``)."""
    if args.method == "bm25":
        rows = {text: row for row, text in enumerate(texts)}
        others = dict.fromkeys(text for group in positives for text in group if text not in rows)
        rows |= {text: row for row, text in enumerate(others, start=len(texts))}
        index = BM25([*texts, *others])  # positives that are not among the passages have a score, too
        scores, found = index.search(questions, k)
        lowest = [
            float(index.scores(question)[[rows[text] for text in group]].min())
            for question, group in zip(questions, positives, strict=False)
        ]
        return (scores, np.where(found < len(texts), found, -1)), lowest
    device = distributed.init(device=args.device)
    retriever = load_encoder(args, device, normalized=True)
    if retriever.normalized and not args.norm:
        raise ValueError(f"{retriever.origin} was trained on vectors of length 1: give --norm")
    length, amp = args.passage_maxlength, "fp32" if args.no_fp16 else "auto"
    how = args.per_gpu_batch_size, length, args.norm
    found = dense_search(retriever, texts, questions, k, *how, args.norm, amp)
    lowest = []
    if positives:
        of_questions = retriever.encode(questions, *how, amp, "query")
        of_positives = retriever.encode([text for group in positives for text in group], *how, amp, "passage")
        groups = np.split(of_positives, np.cumsum([len(group) for group in positives])[:-1])
        lowest = [float((group @ of).min()) for group, of in zip(groups, of_questions, strict=True)]
    return found, lowest


def positive_texts(records: Sequence[dict], passages: Sequence[Passage]) -> list[list[str]]:
    """Title and text of the positives of each record: those of the same passage in the collection, if it is there."""
    by_text, by_id = {p.text: p for p in passages}, {p.id: p for p in passages}
    found = [[by_text.get(p["text"]) or by_id.get(str(p.get("id"))) or p for p in r["positive_ctxs"]] for r in records]
    return [[p.full_text() if isinstance(p, Passage) else titled(p.get("title"), p["text"]) for p in f] for f in found]


def is_positive(passage: Passage, record: dict) -> bool:
    """Whether a passage is one of the positives, or holds one of the record's ``answers``, where it has any."""
    positives = record["positive_ctxs"]
    ids = [str(positive["id"]) for positive in positives if positive.get("id") is not None]
    is_one = passage.id in ids or any(positive["text"] == passage.text for positive in positives)
    return is_one or has_answer(record.get("answers", []), passage.text)


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
    check_minimum(args, margin=0, relative_margin=0, candidates=1)
    if args.method == "bm25" and (args.model_name_or_path is not None or args.norm):
        raise ValueError("--model_name_or_path and --norm have no effect on --method bm25")
    records, passages = read_questions_and_passages(args)
    if not records:
        raise ValueError("there is no question with a positive")
    most_positives = max(len(record["positive_ctxs"]) for record in records)
    k = args.hard_negatives + args.skip_top + most_positives
    k += k if any(record.get("answers") for record in records) else 0  # further ones hold an answer
    with_margin = args.margin is not None or args.relative_margin is not None
    k = args.candidates or (10 * k if with_margin else k)
    texts, questions = [passage.full_text() for passage in passages], [record["question"] for record in records]
    positives = positive_texts(records, passages) if with_margin else []
    (scores, ranked), lowest = rank_passages(args, questions, texts, k, positives)
    if with_margin:
        lowest = np.array(lowest)[:, None]
        highest = lowest - (args.margin or 0) - (args.relative_margin or 0) * np.abs(lowest)
        ranked = np.where(scores <= highest, ranked, -1)
    counts = args.hard_negatives, args.random_negatives, args.skip_top
    mined = [
        with_negatives(record, rows, passages, *counts, Draws.seeded(args.seed, number))
        for number, (record, rows) in enumerate(zip(records, ranked.tolist(), strict=True))
    ]
    write_json_lines(Path(args.output_path), mined)
    found = sum(len(record["hard_negative_ctxs"]) for record in mined) / len(mined)
    print(f"{args.output_path}: {len(mined)} questions, {found:.1f} hard negatives each, by {args.method}")
    too_few = sum(len(record["hard_negative_ctxs"]) < args.hard_negatives for record in mined)
    if with_margin and too_few:
        print(f"{too_few} questions have fewer than {args.hard_negatives} among their {k} best passages (--candidates)")


def main() -> None:
    distributed.run_script(mine, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
