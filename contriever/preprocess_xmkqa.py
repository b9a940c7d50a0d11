"""MKQA to question files for passage_retrieval.py: questions in 26 languages, answers in English (section 4.4, XMKQA).

    python preprocess_xmkqa.py mkqa.jsonl mkqa
    python passage_retrieval.py --data "mkqa/*.jsonl" --lowercase --normalize_text --model_name_or_path \\
        facebook/mcontriever --passages psgs_w100.tsv --passages_embeddings "embeddings/*" --output_dir mkqa_results

Questions are left out whose English answers are all unanswerable, yes or no, or long.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contriever.text.files import read_json_lines, write_json_lines
from shared import distributed
from shared.run.flags import Parser

NO_SPAN = ("unanswerable", "binary", "long_answer")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("data_path", help="mkqa.jsonl")
    parser.add_argument("output_path", help="folder to write one file per language to")
    return parser


def convert(data_path: Path, output_path: Path) -> dict[str, int]:
    """Write ``<language>.jsonl`` for every language; the numbers of questions."""
    found = defaultdict(list)
    for where, record in read_json_lines(data_path):
        try:
            answers, example_id = english_answers(record["answers"]["en"]), record["example_id"]
            questions = dict(record["queries"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: not a record of MKQA ({error!r})") from None
        for language, question in questions.items() if answers is not None else ():
            name = language.replace("-", "_").lower()  # zh_cn
            found[name].append({"id": example_id, "lang": name, "question": question, "answers": answers})
    if not found:
        raise ValueError(f"{data_path} has no question with an answer")
    for name, records in found.items():
        write_json_lines(output_path / f"{name}.jsonl", records)
    return {name: len(records) for name, records in found.items()}


def english_answers(answers: list[dict]) -> list[str] | None:
    """Aliases and texts of the answers that are spans; None if none is."""
    spans = [answer for answer in answers if answer["type"] not in NO_SPAN]
    found = [text for answer in spans for text in [*answer.get("aliases", []), answer["text"]]]
    return found if spans else None


def main() -> None:
    with distributed.clean_exit():
        args = get_args_parser().parse_args()
        counts = convert(Path(args.data_path), Path(args.output_path))
        print(", ".join(f"{language}: {count}" for language, count in counts.items()))


if __name__ == "__main__":
    main()
