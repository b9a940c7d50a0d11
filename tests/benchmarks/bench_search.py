"""Seconds from the command to the answer of search.py: without torch, beside the same search with torch, and beside
ten lines with sentence-transformers that search stored vectors (of unchanged notes: they do not look for changes).

    python tests/benchmarks/bench_search.py [--notes 2000] [--retriever dense] [--rounds 5]

Every note is a passage; its vector is a random one, so that nothing has to be embedded beforehand. Both ways search the
same index by the packaged encoder, in turns, each in a process of its own; torch is what searches fall back to where no
file for onnxruntime can be kept. Nobody else should use the machine meanwhile.
"""

import os
import random
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import onnxruntime
import torch

from contriever import search
from contriever.model_files import find_model
from tests.benchmarks import harness

MOST_SECONDS = 1.0
QUERY = "the stall of a wing"
LIBRARY = """
import sys
import numpy
from sentence_transformers import SentenceTransformer, util
model = SentenceTransformer(sys.argv[1], device="cpu", local_files_only=True)
print(util.semantic_search(model.encode_query(sys.argv[2]), numpy.load(sys.argv[3]), top_k=5))
"""


def write_notes(folder: Path, count: int) -> list[str]:
    """Notes of 100 words and their index; returns the flags of a search."""
    draw = random.Random(0)
    words = [f"{a}{b}" for a in ("wing", "heat", "plate", "flow", "stall") for b in range(400)]
    for i in range(count):
        (folder / f"{i % 100}").mkdir(exist_ok=True)
        (folder / f"{i % 100}" / f"{i}.txt").write_text(" ".join(draw.choices(words, k=100)))
    flags = ["--passages", str(folder)]
    index = search.open_index(search.get_args_parser().parse_args(flags))
    vectors = np.random.default_rng(0).standard_normal((512, 384)).astype(np.float32)
    index.encode = lambda texts, kind: vectors[: len(texts)] / np.linalg.norm(vectors[: len(texts)], axis=1)[:, None]
    index.update()
    return flags


def main() -> None:
    parser = harness.get_args_parser(__doc__, rounds=5)
    parser.add_argument("--notes", type=int, default=2000)
    parser.add_argument("--retriever", default="dense", choices=("dense", "bm25", "hybrid"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        notes, cache = Path(folder) / "notes", Path(folder) / "cache"
        notes.mkdir()
        os.environ["XDG_CACHE_HOME"] = str(cache)
        flags = [*write_notes(notes, args.notes), "--query", QUERY, "--retriever", args.retriever]

        def answer(**environment: str) -> str:
            command = [sys.executable, str(ROOT / "contriever" / "search.py"), *flags]
            done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
            return done.stdout.partition("\n")[2]

        ways = {"torch": lambda: answer(XDG_CACHE_HOME="/dev/null/none"), "without torch": answer}
        if find_spec("sentence_transformers"):
            stored = Path(folder) / "vectors.npy"
            np.save(stored, np.random.default_rng(0).standard_normal((args.notes, 384)).astype(np.float32))
            command = [sys.executable, "-c", LIBRARY, str(find_model(None)), QUERY, str(stored)]
            ways["sentence-transformers"] = lambda: subprocess.run(command, capture_output=True, check=True)
        same = ways["torch"]() == ways["without torch"]()
        times = harness.alternate(ways, args.rounds)
    rows = harness.compare(times, "torch")
    targets = {
        "both ways answer the same": same,
        f"a search of {args.notes:,} notes takes less than {MOST_SECONDS} s": min(times["without torch"])
        < MOST_SECONDS,
    }
    harness.finish(args, {"ways": rows}, targets, packages=(torch, onnxruntime))


if __name__ == "__main__":
    main()
