"""Mr. TyDi's folders of a language to the layout of BEIR, which eval_beir.py reads.

    python convertmrtydi2beir.py mrtydi-v1.1-swahili beir/mrtydi-sw
    python eval_beir.py --model_name_or_path facebook/mcontriever --beir_dir beir --dataset mrtydi-sw --normalize_text

Takes topic.tsv, collection/docs.jsonl and qrels.{train,dev,test}.txt, each perhaps with .gz at its end.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contriever.beir import read_qrels, read_queries
from contriever.text.files import find_packed, read_json_lines, text_field, write_json_lines
from shared import distributed
from shared.run.flags import Parser

SPLITS = ("train", "dev", "test")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("data_path", help="folder of one language of Mr. TyDi")
    parser.add_argument("output_path", help="folder to write")
    return parser


def convert(data_path: Path, output_path: Path) -> None:
    """Write corpus.jsonl, queries.jsonl and the judgements of the splits that are there."""
    splits = {split: file for split in SPLITS if (file := find_packed(data_path / f"qrels.{split}.txt"))}
    needed = [find_packed(path) or path for path in (data_path / "topic.tsv", data_path / "collection" / "docs.jsonl")]
    missing = [str(path) for path in needed if not path.is_file()] or ([] if splits else ["qrels.*.txt"])
    if missing:
        raise ValueError(f"{data_path} is no folder of Mr. TyDi: there is no {', no '.join(missing)}")
    (output_path / "qrels").mkdir(parents=True, exist_ok=True)
    queries = ({"_id": query, "text": text} for _, query, text in read_queries(needed[0]))
    write_json_lines(output_path / "queries.jsonl", queries)
    documents = (
        {"_id": text_field(record, "id", where), "title": "", "text": text_field(record, "contents", where)}
        for where, record in read_json_lines(needed[1])
    )
    write_json_lines(output_path / "corpus.jsonl", documents)
    for split, file in splits.items():
        lines = [
            f"{query}\t{document}\t{grade}\n"
            for query, of in read_qrels(file).items()
            for document, grade in of.items()
        ]
        header = "query-id\tcorpus-id\tscore\n"
        (output_path / "qrels" / f"{split}.tsv").write_text(header + "".join(lines), encoding="utf-8")


def main() -> None:
    with distributed.clean_exit():
        args = get_args_parser().parse_args()
        convert(Path(args.data_path), Path(args.output_path))


if __name__ == "__main__":
    main()
