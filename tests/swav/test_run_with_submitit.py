"""Jobs and recipes: every published recipe is understood by its training script, however it is started."""

import os
import subprocess
from pathlib import Path

import pytest

from swav import main_deepclusterv2, main_swav, run_with_submitit

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "swav/scripts").glob("*_pretrain.sh"))


def started(recipe: Path, launcher: str, folder: Path) -> list[str]:
    """The command that a recipe would start, from a shell where ``python`` and ``torchrun`` only print."""
    for program in ("python", "torchrun"):
        (folder / program).write_text('#!/bin/bash\nprintf "%s\\n" "$(basename "$0")" "$@"\n')
        (folder / program).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "LAUNCHER": launcher, "RENDEZVOUS": "host:1"}
    command = ["bash", str(recipe), "--data_path", "my images", "--epochs", "50"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=folder)
    return printed.stdout.splitlines()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_start_jobs_and_torchrun(recipe, tmp_path, submitted):
    program, script, *flags = started(recipe, "slurm", tmp_path)
    assert (program, Path(script)) == ("python", ROOT / "swav/run_with_submitit.py")
    run_with_submitit.main(flags)
    train, job = submitted[0]
    assert (job.data_path, job.epochs) == ("my images", 50)  # flags behind the recipe's name replace its own
    if recipe.stem.startswith("swav"):
        assert train is main_swav.train_swav
        assert job.queue_length % (job.nodes * job.ngpus * job.batch_size) == 0

    program, *rest = started(recipe, "torchrun", tmp_path)
    place = next(i for i, word in enumerate(rest) if word.endswith(".py"))
    parser = main_swav if recipe.stem.startswith("swav") else main_deepclusterv2
    assert program == "torchrun" and Path(rest[place]) == Path(parser.__file__)
    assert f"--nproc_per_node={job.ngpus}" in rest[:place] and f"--nnodes={job.nodes}" in rest[:place]
    args = parser.parse_args(rest[place + 1 :])
    assert vars(args).items() <= vars(job).items()
