"""2,000 small files and one of 10 MB, indexed by processes that are killed ten times; FULL_SIZE=1: both ten times."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from contriever.own_texts.index import PASSAGES_PER_TRANSACTION

ROOT = Path(__file__).resolve().parents[2]
SMALL_FILES, LARGE_MB = (20_000, 100) if "FULL_SIZE" in os.environ else (2_000, 10)
KILLS_AMONG_SMALL_FILES, KILLS_WITHIN_THE_LARGE_ONE = 6, 4
HASH_BYTES = 8
# notes which texts it is given, and costs nothing else
INDEXER = f"""
import hashlib, sys
from pathlib import Path
import numpy as np
from contriever.own_texts.index import SearchIndex

def encode(texts, kind):
    hashes = [hashlib.sha256(text.encode()).digest()[:{HASH_BYTES}] for text in texts]
    log.write(b"".join(hashes))
    return np.array([list(h) for h in hashes], np.float32) / 256

with open(sys.argv[2], "ab", buffering=0) as log:
    index = SearchIndex(Path(sys.argv[1]), Path(sys.argv[1]) / ".index", encode, {{"model": 1}})
    update = index.update(lambda update: print(update.progress(), flush=True))
    print(update.describe())
"""


def write_texts(folder: Path) -> None:
    """The small files come first."""
    words = [f"{a}{b}" for a in ("wing", "heat", "plate", "flow") for b in range(50)]
    draw = random.Random(0)
    for i in range(SMALL_FILES):
        if i % 200 == 0:
            (folder / f"{i // 200:03}").mkdir(parents=True)
        (folder / f"{i // 200:03}" / f"{i}.txt").write_text(f"{i} {' '.join(draw.choices(words, k=12))}")
    (folder / "large").mkdir()
    with open(folder / "large" / "large.txt", "w") as file:
        while file.tell() < LARGE_MB * 1_000_000:
            file.writelines(f"{draw.random()} {' '.join(draw.choices(words, k=110))}\n\n" for _ in range(100))


def start(folder: Path, log: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", INDEXER, folder, log], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def embedded(log: Path) -> list[bytes]:
    data = log.read_bytes()
    return [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]


@pytest.mark.slow
def test_kills_at_random_instants_embed_no_text_twice_but_the_last(tmp_path):
    folder, log, seed = tmp_path / "texts", tmp_path / "log", random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    write_texts(folder)
    log.touch()
    large = LARGE_MB * 1000  # passages, at least
    goals = [draw.randrange(SMALL_FILES) for _ in range(KILLS_AMONG_SMALL_FILES)]
    goals += [SMALL_FILES + draw.randrange(large) for _ in range(KILLS_WITHIN_THE_LARGE_ONE)]
    done, ends = [], []
    for goal in sorted(goals):
        with start(folder, log) as process:
            while log.stat().st_size < goal * HASH_BYTES and process.poll() is None:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.3))
            assert process.poll() is None
            os.kill(process.pid, signal.SIGKILL)
        done, before = embedded(log), len(done)
        again = set(done[before:]) & set(done[:before])
        assert again <= set(ends[-1:] and ends[-1])  # only what the last call was given
        ends.append(done[-PASSAGES_PER_TRANSACTION:])
    with start(folder, log) as process:
        told = process.stdout.read().splitlines()
    texts = embedded(log)
    assert len(texts) - len(set(texts)) <= PASSAGES_PER_TRANSACTION * len(goals)
    assert process.returncode == 0 and "left" in told[len(told) // 2]
    with start(folder, log) as process:
        assert process.stdout.read().endswith(f"{SMALL_FILES + 1} unchanged files; 0 passages embedded\n")
    assert embedded(log) == texts
    print(f"{len(set(texts))} texts, {len(texts) - len(set(texts))} embedded twice after {len(goals)} kills")
