"""SIGKILL at any instant of XCiT's supervised training: weights, average and mixed batches come back bit for bit."""

import pytest

from shared.run.checkpoint import load_latest
from tests.reliability.runs import Run, Script, assert_same_run, kill_at_random_instants, log_lines, start_ranks
from tests.xcit.training_runs import shrink_networks

FLAGS = (
    "--model xcit_nano_12_p8 --input-size 16 --batch-size 4 --epochs 2 --warmup-epochs 0 --lr 0.05 --drop-path 0.2 "
    "--clip-grad 1 --num_workers 0 --log_freq 1 --no-repeated-aug --pictures off --device cpu --saveckp_steps 1 "
    "--eval-ema"
)
XCIT = Script("xcit.main", tuple(FLAGS.split()), shrink_networks)


@pytest.mark.parametrize("kills", [3, 20])
def test_runs_killed_at_random_instants_end_like_an_uninterrupted_one(kills, images, tmp_path):
    uninterrupted = tmp_path / "uninterrupted"
    Run(uninterrupted, "--data_path", images, script=XCIT).assert_ends()
    for folder in kill_at_random_instants(tmp_path, kills, "--data_path", images, script=XCIT):
        assert_same_run(folder, uninterrupted)
    steps = [line["step"] for line in log_lines(uninterrupted) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 8


def test_two_ranks_killed_together_end_like_an_uninterrupted_pair(images, tmp_path):
    flags = ("--data_path", images, "--batch-size", 2)
    for rank in start_ranks(tmp_path / "uninterrupted", 2, *flags, script=XCIT):
        rank.assert_ends()
    for step in (2, 5):
        ranks = start_ranks(tmp_path / "run", 2, *flags, script=XCIT)
        ranks[0].wait_for_step(step)
        for rank in ranks:
            rank.kill()
    for rank in start_ranks(tmp_path / "run", 2, *flags, script=XCIT):
        rank.assert_ends()
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")
    assert load_latest(tmp_path / "run/checkpoint.pth")["world_size"] == 2
