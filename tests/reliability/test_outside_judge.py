"""ckpt-chaos, a package that knows nothing of this project, kills saves at every file operation and compares.

Its modes: ``before`` a file operation; ``torn``, with the file cut in half; ``unsynced``, where all is lost that was
not flushed to the disk, as in a power cut; ``term``, SIGTERM and a kill some seconds later.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.runs import DINO, ROOT

HERE = Path(__file__).parent
SMALL_DINO = (
    "from tests.dino.tiny import shrink_networks; shrink_networks(); from dino import main_dino;main_dino.main()"
)


def judge(work: Path, command: list[str], *options: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """What ckpt-chaos says of a command with ``{out}`` for its folder, and its record of every kill."""
    pytest.importorskip("ckpt_chaos")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | {"OMP_NUM_THREADS": "1"}
    judgement = subprocess.run(
        [sys.executable, "-m", "ckpt_chaos", "run", "--work", work, *options, "--", sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    records = [json.loads(path.read_text()) for path in work.glob("pt_*/result.json")]
    return judgement, sorted((record for record in records if "point" in record), key=lambda record: record["order"])


def save_loop(protocol: str) -> list[str]:
    return [str(HERE / "save_loop.py"), "{out}", "--protocol", protocol]


def completed_saves(work: Path, event: int) -> int:
    """How many checkpoints had got their name before the ``event``-th file operation of the undisturbed run."""
    operations = [line.split("\t") for line in (work / "reference/events.log.rank0").read_text().splitlines()]
    # the audit names a rename by its source: the temporary file of the save
    names = [name for _, kind, name, _ in operations[: event - 1] if kind == "os.rename"]
    return sum(name.startswith(".checkpoint.pth.") and not name.endswith(".link") for name in names)


def test_a_kill_at_every_file_operation_of_a_save_loses_nothing(tmp_path):
    options = ("--result-file", "{out}/checkpoint.pth", "--step-regex", r"resumed from step (\d+)")
    options += ("--modes", "before,torn,unsynced", "--max-points", "1000", "--jobs", "2")
    judgement, kills = judge(tmp_path / "work", save_loop("ours"), *options)
    assert judgement.returncode == 0, judgement.stdout
    assert len(kills) > 40 and all(kill["crashed"] for kill in kills)
    assert {mode for _, mode in (kill["point"] for kill in kills)} == {"before", "torn", "unsynced"}
    for kill in kills:
        done = completed_saves(tmp_path / "work", kill["point"][0])
        assert kill["outcome"]["resumed_from_step"] == done, kill["label"]
    expected = {path.name: path.read_bytes() for path in (tmp_path / "work/reference/out").iterdir()}
    assert set(expected) == {"checkpoint.pth", "checkpoint.pth.previous", "checkpoint0000.pth", "checkpoint0002.pth"}
    for folder in (tmp_path / "work").glob("pt_*/out"):
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected, folder
    print(f"{len(kills)} kills")


@pytest.mark.parametrize(("protocol", "mode"), [("overwrite", "torn"), ("unsynced", "unsynced")])
def test_the_judge_finds_the_mistakes_of_other_protocols(protocol, mode, tmp_path):
    options = ("--result-file", "{out}/checkpoint.pth", "--modes", mode, "--max-points", "4", "--jobs", "2")
    judgement, _ = judge(tmp_path / "work", save_loop(protocol), *options)
    assert judgement.returncode == 1 and "HARD_FAIL" in judgement.stdout


@pytest.mark.parametrize(("ranks", "points"), [(1, 15), (2, 6)])
def test_the_real_script_killed_at_file_operations_ends_like_an_undisturbed_run(ranks, points, images, tmp_path):
    flags = [*DINO.flags, "--epochs", "1", "--saveckp_steps", "3", "--data_path", str(images)]
    flags += ["--batch_size_per_gpu", str(4 // ranks)]
    fingerprint = f"{sys.executable} {HERE / 'fingerprint.py'} {{out}}"
    options = ("--result-cmd", fingerprint, "--modes", "before,unsynced,term", "--max-points", str(points))
    options += ("--ranks", str(ranks), "--grace", "30", "--jobs", "2")
    judgement, kills = judge(tmp_path / "work", ["-c", SMALL_DINO, *flags, "--output_dir", "{out}"], *options)
    assert judgement.returncode == 0, judgement.stdout
    assert len(kills) == points
    print(f"{len(kills)} kills")
