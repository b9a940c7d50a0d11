"""The small experiments behind contriever/README.md: the paper's claims on the 1,400 abstracts of Cranfield.

    python tests/evidence/contriever.py --cranfield FOLDER --out build/evidence/contriever    # hours on two cores
    python tests/evidence/contriever.py --cranfield FOLDER --out build/short --short          # a few steps

``FOLDER`` is in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/test.tsv). Unsupervised training sees the documents
only and is judged with all queries. Fine-tuning sees half of the queries and is judged, like what it starts from, with
the other half. Numbers are those of the last step, mean and standard deviation over the seeds.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from contriever import finetuning, mine_negatives, new_encoder, preprocess, train
from contriever.beir_data import BeirDataset, read_beir
from contriever.beir_metrics import evaluate_run
from contriever.encoder import find_model, load_retriever
from contriever.eval_beir import TOP_K, as_run, dense_search, document_texts
from contriever.hybrid import BM25, fuse
from tests.evidence.runs import SEEDS, machine, spread

COLUMNS = ("NDCG@10", "Recall@100", "MRR@10")
MAX_TOKENS = 256
NORMS = "--norm_query --norm_doc"
COMMON = (
    "--chunks document --chunk_length 256 --ratio_min 0.05 --ratio_max 0.5 --augmentation delete "
    "--prob_augmentation 0.1 --num_workers 0 --log_freq 50 --eval_freq 0 --save_freq 0"
)
SCRATCH = f"{COMMON} {NORMS} --per_gpu_batch_size 32 --warmup_steps 100 --total_steps 1500 --lr 0.0005"
MOCO = "--contrastive_mode moco --queue_size 1024 --momentum 0.99 --temperature 0.05"
CLAIMS = {
    "crops, MoCo, 1024 negatives, temperature 0.05": MOCO,
    "inverse cloze task instead of crops": f"{MOCO} --pairs ict",
    "in-batch instead of MoCo (31 negatives)": "--contrastive_mode inbatch --temperature 0.05",
    "MoCo, 128 negatives": f"{MOCO} --queue_size 128",
    "MoCo, 8192 negatives": f"{MOCO} --queue_size 8192",
    "MoCo, temperature 0.2": f"{MOCO} --temperature 0.2",
    "MoCo, temperature 1": f"{MOCO} --temperature 1",
    "no deletion of tokens": f"{MOCO} --augmentation none",
}
CONTINUED = f"{COMMON} {NORMS} {MOCO} --per_gpu_batch_size 16 --warmup_steps 50 --total_steps 500 --lr 0.00002"
FINETUNING = (
    f"{NORMS} --temperature 0.05 --per_gpu_batch_size 16 --chunk_length 256 --total_steps 100 --warmup_steps 10 "
    "--lr 0.00002 --negative_ctxs 1 --num_workers 0 --log_freq 10 --eval_freq 0 --save_freq 0"
)


def metrics(dataset: BeirDataset, answers) -> dict[str, float]:
    """nDCG@10, recall@100 and MRR@10 in percent."""
    found = evaluate_run(dataset.qrels, as_run(dataset, answers), (10, 100))
    return {name: found[name] for name in COLUMNS}


def dense(dataset: BeirDataset, encoder: str | Path | None):
    """Answers of an encoder; vectors are normalised, as in all of the training here."""
    queries = list(dataset.queries.values())
    return dense_search(
        load_retriever(encoder), document_texts(dataset), queries, TOP_K + 1, 32, MAX_TOKENS, True, True
    )


def lexical(dataset: BeirDataset):
    return BM25(document_texts(dataset)).search(list(dataset.queries.values()), TOP_K + 1)


def half(dataset: BeirDataset, which: int) -> BeirDataset:
    """Every second query, from ``which`` on."""
    chosen = list(dataset.queries)[which::2]
    return BeirDataset(
        dataset.name,
        dataset.documents,
        {query: dataset.queries[query] for query in chosen},
        {query: dataset.qrels[query] for query in chosen},
    )


def write_half(dataset: BeirDataset, source: Path, folder: Path) -> None:
    """A folder in BEIR's layout whose split ``train`` is a part of the queries."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name in ("corpus.jsonl", "queries.jsonl"):
        shutil.copy(source / name, folder / name)
    lines = [f"{query}\t{document}\t{grade}" for query, row in dataset.qrels.items() for document, grade in row.items()]
    (folder / "qrels/train.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")


def write_small(source: Path, folder: Path, queries: int = 12, documents: int = 100) -> Path:
    """A collection of the first queries, their judged documents and some others; one that is there stays."""
    if (folder / "qrels/test.tsv").exists():
        return folder
    dataset = read_beir(source)
    chosen = list(dataset.queries)[:queries]
    judged = {document for query in chosen for document in dataset.qrels[query]}
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    lines = (source / "corpus.jsonl").read_text().splitlines(keepends=True)
    kept = [line for i, line in enumerate(lines) if i < documents or json.loads(line)["_id"] in judged]
    (folder / "corpus.jsonl").write_text("".join(kept))
    shutil.copy(source / "queries.jsonl", folder)
    rows = [f"{query}\t{document}\t{grade}" for query in chosen for document, grade in dataset.qrels[query].items()]
    (folder / "qrels/test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
    return folder


def call(script, function: Callable, arguments: str, *paths) -> None:
    """A script in this process, as its command line would start it."""
    words = [*arguments.split(), *map(str, paths)]
    function(script.parse_args(words) if hasattr(script, "parse_args") else script.get_args_parser().parse_args(words))


class Experiment:
    """Runs every variant with every seed, writing ``results.json`` after each."""

    def __init__(self, cranfield: Path, out: Path, short: bool):
        self.source, self.out, self.short = cranfield, out, short
        if short:
            self.source = write_small(cranfield, out / "small")
        self.dataset = read_beir(self.source)
        self.learn, self.judge = half(self.dataset, 0), half(self.dataset, 1)
        self.results: list[dict] = []
        out.mkdir(parents=True, exist_ok=True)

    def add(self, variant: str, queries: str, values: dict[str, float], seed: int | None = None, minutes: float = 0.0):
        self.results.append({"variant": variant, "queries": queries, "seed": seed, "minutes": minutes, **values})
        (self.out / "results.json").write_text(json.dumps({"machine": machine(), "results": self.results}, indent=1))
        print(self.results[-1], flush=True)

    def tokenized(self, encoder: Path) -> Path:
        """The documents as a data set of an encoder."""
        folder = self.out / "tokens" / encoder.name
        flags = f"--datapath {self.source / 'corpus.jsonl'} --outdir {folder} --tokenizer {encoder} --num_workers 1"
        call(preprocess, preprocess.preprocess, flags)
        return folder

    def steps(self, flags: str) -> str:
        return f"{flags} --total_steps 3 --warmup_steps 1 --per_gpu_batch_size 4" if self.short else flags

    def train(self, name: str, encoder: Path, flags: str, seed: int) -> tuple[Path, float]:
        """The trained encoder and the minutes it took."""
        run, start = self.out / name / str(seed), time.perf_counter()
        call(
            train,
            train.train_contriever,
            f"{self.steps(flags)} --seed {seed}",
            *("--train_data", self.tokenized(encoder), "--retriever_model_id", encoder, "--output_dir", run),
        )
        return run / "encoder", (time.perf_counter() - start) / 60

    def untrained(self) -> None:
        bm25, given = lexical(self.dataset), dense(self.dataset, None)
        self.add("BM25", "all", metrics(self.dataset, bm25))
        self.add("packaged encoder as given", "all", metrics(self.dataset, given))
        for weight in (0.3, 0.5, 0.7):
            hybrid = fuse(given, bm25, TOP_K + 1, weight)
            self.add(f"hybrid, weight {weight} on the encoder", "all", metrics(self.dataset, hybrid))

    def from_scratch(self, seed: int) -> None:
        """The claims, each starting from the same random weights."""
        encoder = self.out / f"scratch{seed}"
        if not encoder.exists():
            flags = f"--text {self.source / 'corpus.jsonl'} --outdir {encoder} --vocab_size 6000 --seed {seed}"
            call(new_encoder, new_encoder.new_encoder, f"{flags} --hidden_size 192 --layers 3 --heads 3")
        self.add("random weights, 3 layers", "all", metrics(self.dataset, dense(self.dataset, encoder)), seed)
        for name, flags in list(CLAIMS.items())[: 2 if self.short else None]:
            trained, minutes = self.train(name.replace(" ", "_"), encoder, f"{SCRATCH} {flags}", seed)
            self.add(f"from scratch: {name}", "all", metrics(self.dataset, dense(self.dataset, trained)), seed, minutes)

    def pretrained(self, seed: int) -> None:
        """The packaged encoder after more unsupervised training, and after fine-tuning on half of the queries."""
        given = find_model(None)
        continued, minutes = self.train("continued", given, CONTINUED, seed)
        answers = dense(self.dataset, continued)
        self.add("packaged encoder, continued", "all", metrics(self.dataset, answers), seed, minutes)
        hybrid = fuse(answers, lexical(self.dataset), TOP_K + 1, 0.5)
        self.add("hybrid of the continued one", "all", metrics(self.dataset, hybrid), seed)
        write_half(self.learn, self.source, self.out / "half")
        records = self.out / "hard.jsonl"
        mining = f"--beir {self.out / 'half'} --split train --output_path {records} --hard_negatives 10 --skip_top 0"
        call(mine_negatives, mine_negatives.mine, mining)
        for name, start, ratio in (
            ("given", given, 0.0),
            ("given, hard negatives", given, 1.0),
            ("continued, hard negatives", continued, 1.0),
        ):
            self.add(f"before fine-tuning: {name}", "half", metrics(self.judge, dense(self.judge, start)), seed)
            run, begin = self.out / f"finetuned_{name.replace(' ', '_')}" / str(seed), time.perf_counter()
            call(
                finetuning,
                finetuning.finetune,
                f"{self.steps(FINETUNING)} --seed {seed} --negative_hard_ratio {ratio}",
                *("--train_data", records, "--model_path", start, "--output_dir", run),
            )
            minutes = (time.perf_counter() - begin) / 60
            answers = dense(self.judge, run / "encoder")
            self.add(f"after fine-tuning: {name}", "half", metrics(self.judge, answers), seed, minutes)


def table(results: list[dict]) -> str:
    """Markdown: one row per variant, mean and deviation over seeds."""
    rows = ["| variant | queries | nDCG@10 | R@100 | MRR@10 | minutes a run |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(result["variant"] for result in results):
        mine = [result for result in results if result["variant"] == name]
        cells = [spread([result[column] for result in mine]) for column in COLUMNS]
        minutes = statistics.mean(result["minutes"] for result in mine)
        rows.append(f"| {name} | {mine[0]['queries']} | {' | '.join(cells)} | {minutes:.1f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cranfield", type=Path, required=True, help="folder in BEIR's layout")
    parser.add_argument("--out", type=Path, default=Path("build/evidence/contriever"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument(
        "--short",
        action="store_true",
        help="three steps of a few variants on a hundred documents: does everything run?",
    )
    args = parser.parse_args()
    experiment = Experiment(args.cranfield, args.out, args.short)
    experiment.untrained()
    for seed in args.seeds[: 1 if args.short else None]:
        experiment.pretrained(seed)
        experiment.from_scratch(seed)
    text = table(experiment.results)
    (args.out / "contriever.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
