"""The small experiments behind contriever/README.md: the paper's claims on the 1,400 abstracts of Cranfield.

    python -m tests.evidence.contriever --cranfield FOLDER            # about two core-hours

What has ended is not repeated, so that seeds may run side by side (``--seeds 0``, ``--seeds 1``, ...) and a last call
makes the table of all.

``FOLDER`` is in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/test.tsv). Unsupervised training sees the documents
only and is judged with all queries. Fine-tuning sees half of the queries and is judged, like what it starts from, with
the other half. Numbers are those of the last step, mean and standard deviation over the seeds.
"""

import argparse
import functools
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from contriever import finetuning, mine_negatives, new_encoder, preprocess, train
from contriever.beir import BeirDataset, evaluate_queries, means, read_beir
from contriever.encoder import find_model, load_retriever
from contriever.eval_beir import TOP_K, as_run, dense_search, document_texts
from contriever.index.bm25 import BM25, fuse
from tests.evidence.claims import CONFIRMED, Claim
from tests.evidence.runs import SEEDS, machine, once, table, write

COLUMNS = {"NDCG@10": "nDCG@10", "Recall@100": "R@100", "MRR@10": "MRR@10"}
MAX_TOKENS = 256
NORMS = "--norm_query --norm_doc"
COMMON = (
    "--chunks document --chunk_length 256 --ratio_min 0.05 --ratio_max 0.5 --augmentation delete "
    "--prob_augmentation 0.1 --num_workers 0 --log_freq 50 --eval_freq 0 --save_freq 0"
)
SCRATCH = f"{COMMON} {NORMS} --per_gpu_batch_size 32 --warmup_steps 50 --total_steps 400 --lr 0.0005"
MOCO = "--contrastive_mode moco --queue_size 1024 --momentum 0.99 --temperature 0.05"
VARIANTS = {
    "crops, MoCo, 1024 negatives, temperature 0.05": MOCO,
    "inverse cloze task instead of crops": f"{MOCO} --pairs ict",
    "in-batch instead of MoCo (31 negatives)": "--contrastive_mode inbatch --temperature 0.05",
    "MoCo, 128 negatives": f"{MOCO} --queue_size 128",
    "MoCo, temperature 0.2": f"{MOCO} --temperature 0.2",
}
CONTINUED = f"{COMMON} {NORMS} {MOCO} --per_gpu_batch_size 16 --warmup_steps 20 --total_steps 150 --lr 0.00002"
FINETUNING = (
    f"{NORMS} --temperature 0.05 --per_gpu_batch_size 16 --chunk_length 256 --total_steps 60 --warmup_steps 6 "
    "--lr 0.00002 --negative_ctxs 1 --num_workers 0 --log_freq 10 --eval_freq 0 --save_freq 0"
)
FINETUNING_SCRATCH = f"{FINETUNING} --total_steps 200 --warmup_steps 20 --lr 0.0005"  # of small networks
FROM_SCRATCH = ("fine-tuned: random weights, 3 layers", "fine-tuned: from scratch, crops")


RESULTS = "contriever_cranfield"
CROPS, *OTHERS = (f"from scratch: {name}" for name in VARIANTS)
# fmt: off
CLAIMS = [
    Claim("training without labels finds documents (3)", "400 steps from random weights", RESULTS, CROPS,
          "random weights, 3 layers", "NDCG@10"),
    Claim("random crops beat the inverse cloze task (6)", "both, from scratch", RESULTS, CROPS, OTHERS[0], "NDCG@10"),
    Claim("more negatives are better (6)", "1,024; 128, 31", RESULTS, CROPS,
          (OTHERS[2], OTHERS[1]), "NDCG@10"),
    Claim("temperature 0.05 (6)", "beside 0.2", RESULTS, CROPS, OTHERS[3], "NDCG@10"),
    Claim("fine-tuning helps", "113 questions", RESULTS, "fine-tuned: given",
          "as given, the half that judges fine-tuning", "NDCG@10"),
    Claim("mined negatives help it (4.4)", "beside none", RESULTS, "fine-tuned: given, hard negatives",
          "fine-tuned: given", "NDCG@10"),
    Claim("training without labels first helps it (4.4)", "150 steps; none", RESULTS,
          "fine-tuned: continued, hard negatives", "fine-tuned: given, hard negatives", "NDCG@10"),
    Claim("the same", "400 steps of a new encoder; none", RESULTS, FROM_SCRATCH[1], FROM_SCRATCH[0], "NDCG@10"),
    Claim("lexical and dense search complement each other", "both; encoder",
          numbers="43.4, 39.5: 121 questions won, 60 lost, p = 0.0002", found=CONFIRMED),
    Claim("above BM25 without labels (BEIR, questions)"),
    Claim("few-shot retrieval"),
    Claim("many languages"),
]
# fmt: on


def metrics(dataset: BeirDataset, answers) -> dict[str, float]:
    """nDCG@10, recall@100 and MRR@10 in percent."""
    found = means(evaluate_queries(dataset.qrels, as_run(dataset, answers), (10, 100)), len(dataset.qrels))
    return {name: found[name] for name in COLUMNS}


def dense(dataset: BeirDataset, encoder: str | Path | None):
    """Answers of an encoder; vectors are normalised, as in all of the training here."""
    queries = list(dataset.queries.values())
    return dense_search(
        load_retriever(encoder), document_texts(dataset), queries, TOP_K + 1, 32, MAX_TOKENS, True, True
    )


def fused(dataset: BeirDataset, given, weight: float):
    """Answers of an encoder and of BM25 together."""
    bm25, queries = BM25(document_texts(dataset)), list(dataset.queries.values())
    found = bm25.search(queries, TOP_K + 1)
    return fuse(given, found, TOP_K + 1, weight, True, [bm25.focus(query) for query in queries])


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


def call(script, function: Callable, arguments: str, *paths) -> None:
    """A script in this process, as its command line would start it."""
    words = [*arguments.split(), *map(str, paths)]
    function(script.parse_args(words) if hasattr(script, "parse_args") else script.get_args_parser().parse_args(words))


def slug(name: str) -> str:
    """A name as that of a file."""
    return re.sub(r"\W+", "_", name)


class Experiment:
    """Runs every variant with every seed; each row of the table is kept in a file of ``rows``."""

    def __init__(self, cranfield: Path, out: Path):
        self.source, self.out, self.dataset = cranfield, out, read_beir(cranfield)
        self.learn, self.judge = half(self.dataset, 0), half(self.dataset, 1)
        self.results: list[dict] = []
        (out / "rows").mkdir(parents=True, exist_ok=True)

    def row(self, variant: str, seed: int | None, flags: str, work: Callable, judge: BeirDataset | None = None) -> None:
        """Add a row to the results, unless it is there already.

        Args:
            flags: What ``work`` depends on; a row made with others does not count.
            work: Returns the answers to the queries and the minutes of training before them.
            judge: The queries; all by default.
        """

        def values() -> dict:
            answers, minutes = work()
            found = {"minutes": round(minutes, 2), **metrics(judge or self.dataset, answers)}
            return found | {"machine": machine("fp32")}

        found = once(self.out / "rows" / f"{slug(variant)}-{seed}.json", [flags], values)
        queries = "half" if judge else "all"
        self.results.append(
            {"variant": variant, "queries": queries, "seed": seed, "command": flags or variant, **found}
        )
        print(self.results[-1], flush=True)

    def run(self, script, function: Callable, flags: str, seed: int, *paths) -> float:
        """A training; the minutes it took."""
        start = time.perf_counter()
        call(script, function, f"{flags} --seed {seed}", *paths)
        return (time.perf_counter() - start) / 60

    def trained(self, folder: Path, encoder: Path, flags: str, seed: int) -> tuple:
        """Answers of an encoder after unsupervised training on the documents, and the minutes it took."""
        tokens = self.out / "tokens" / f"{encoder.name}-{seed}"
        source = f"--datapath {self.source / 'corpus.jsonl'} --outdir {tokens} --num_workers 1"
        call(preprocess, preprocess.preprocess, source, "--tokenizer", encoder)
        paths = ("--train_data", tokens, "--retriever_model_id", encoder, "--output_dir", folder)
        minutes = self.run(train, train.train_contriever, flags, seed, *paths)
        return dense(self.dataset, folder / "encoder"), minutes

    def finetuned(self, folder: Path, encoder: Path, records: Path, flags: str, seed: int) -> tuple:
        """Answers to the other half of the queries after training on one half, and the minutes it took."""
        paths = ("--train_data", records, "--model_path", encoder, "--output_dir", folder)
        minutes = self.run(finetuning, finetuning.finetune, flags, seed, *paths)
        return dense(self.judge, folder / "encoder"), minutes

    def records(self, seed: int) -> Path:
        """Half of the queries with their documents and ten negatives of the packaged encoder."""
        path = self.out / f"half{seed}" / "hard.jsonl"
        if not path.exists():
            write_half(self.learn, self.source, path.parent)
            mining = f"--beir {path.parent} --split train --hard_negatives 10 --skip_top 0"
            call(mine_negatives, mine_negatives.mine, mining, "--output_path", path)
        return path

    def untrained(self) -> None:
        given = functools.cache(lambda: dense(self.dataset, None))
        bm25 = BM25(document_texts(self.dataset))
        self.row("BM25", None, "", lambda: (bm25.search(list(self.dataset.queries.values()), TOP_K + 1), 0))
        self.row("packaged encoder as given", None, "", lambda: (given(), 0))
        for weight in (0.3, 0.5, 0.7, 0.8):
            both = functools.partial(lambda weight: (fused(self.dataset, given(), weight), 0), weight)
            self.row(f"hybrid, weight {weight} on the encoder", None, "", both)
        self.row(
            "as given, the half that judges fine-tuning", None, "", lambda: (dense(self.judge, None), 0), self.judge
        )

    def from_scratch(self, seed: int) -> None:
        """The claims, each starting from the same random weights."""
        encoder = self.out / f"scratch{seed}"
        if not (encoder / "model.safetensors").exists():
            flags = f"--text {self.source / 'corpus.jsonl'} --outdir {encoder} --vocab_size 6000 --seed {seed}"
            call(new_encoder, new_encoder.new_encoder, f"{flags} --hidden_size 192 --layers 3 --heads 3")
        self.row("random weights, 3 layers", seed, "", lambda: (dense(self.dataset, encoder), 0))
        for name, flags in VARIANTS.items():
            job = (self.out / slug(name) / str(seed), encoder, f"{SCRATCH} {flags}", seed)
            self.row(f"from scratch: {name}", seed, job[2], functools.partial(self.trained, *job))
        starts = encoder, self.out / slug(next(iter(VARIANTS))) / str(seed) / "encoder"
        for name, start in zip(FROM_SCRATCH, starts, strict=True):
            job = (self.out / slug(name) / str(seed), start, self.records(seed), FINETUNING_SCRATCH, seed)
            self.row(name, seed, FINETUNING_SCRATCH, functools.partial(self.finetuned, *job), self.judge)

    def pretrained(self, seed: int) -> None:
        """The packaged encoder after more unsupervised training, and after fine-tuning on half of the queries."""
        given, folder = find_model(None), self.out / "continued" / str(seed)
        continued = folder / "encoder"
        further = functools.partial(self.trained, folder, given, CONTINUED, seed)
        self.row("packaged encoder, continued", seed, CONTINUED, further)
        records = self.records(seed)
        for name, start, ratio in (
            ("given", given, 0.0),
            ("given, hard negatives", given, 1.0),
            ("continued, hard negatives", continued, 1.0),
        ):
            job = (self.out / slug(f"finetuned {name}") / str(seed), start, records)
            flags = f"{FINETUNING} --negative_hard_ratio {ratio}"
            self.row(
                f"fine-tuned: {name}", seed, flags, functools.partial(self.finetuned, *job, flags, seed), self.judge
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cranfield", type=Path, required=True, help="folder in BEIR's layout")
    parser.add_argument("--out", type=Path, default=Path("build/evidence/contriever"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    args = parser.parse_args()
    experiment = Experiment(args.cranfield, args.out)
    experiment.untrained()
    for seed in args.seeds:
        experiment.pretrained(seed)
        experiment.from_scratch(seed)
    write(args.out, RESULTS, experiment.results, table(experiment.results, COLUMNS))


if __name__ == "__main__":
    main()
