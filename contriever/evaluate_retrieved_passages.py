"""Top-k accuracy of retrieved passages: the share of questions with an answer in one of the first k (section 4.2).

    python evaluate_retrieved_passages.py --data "contriever_nq/*.jsonl"     # released Contriever on NQ: R@20 67.8

Reads the files that passage_retrieval.py writes. An answer counts when its words follow each other in the passage's
text, in any case; titles are not searched.
"""

import argparse
import glob
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from contriever.text.answers import hits_within, match_questions
from contriever.text.files import check_list, read_json_lines, text_field
from shared import distributed
from shared.run.flags import Parser

RANKS = (5, 10, 20, 100)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="glob pattern of result files (.jsonl)")
    parser.add_argument("--validation_workers", type=int, default=16, help="processes at most; few questions need one")
    return parser


def evaluate_retrieved_passages(args: argparse.Namespace) -> dict[str, dict[int, float]]:
    """``{file: {k: accuracy in percent}}`` for those k of 5, 10, 20, 100 that the files reach."""
    files = sorted(glob.glob(args.data))
    if not files:
        raise ValueError(f"--data {args.data}: no such file")
    accuracies = {}
    for file in files:
        questions = [read_question(record, where) for where, record in read_json_lines(file)]
        if not questions:
            raise ValueError(f"{file} is empty")
        accuracies[file] = accuracy_at(match_questions(questions, args.validation_workers))
        print(f"{file}: {format_accuracies(accuracies[file])}", flush=True)
    print("\t".join(files))
    for k in (20, 100):
        print("\t".join(f"{found[k]:.1f}" if k in found else "-" for found in accuracies.values()), flush=True)
    return accuracies


def read_question(record: dict, where: str) -> tuple[list[str], list[str]]:
    """Answers, and texts of the retrieved passages."""
    check_list(record, "answers", str, "strings", where)
    check_list(record, "ctxs", dict, "passages", where)
    return record["answers"], [text_field(passage, "text", where) for passage in record["ctxs"]]


def accuracy_at(hits: list[list[bool]]) -> dict[int, float]:
    """``{k: percent of questions with a hit among the first k}``; k no larger than the longest list of passages."""
    counts = hits_within(hits)
    return {k: 100 * counts[k - 1] / len(hits) for k in RANKS if k <= len(counts)}


def format_accuracies(accuracies: dict[int, float]) -> str:
    return " ".join(f"R@{k}: {accuracy:.1f}" for k, accuracy in accuracies.items()) or "fewer than 5 passages"


def main() -> None:
    distributed.run_script(evaluate_retrieved_passages, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
