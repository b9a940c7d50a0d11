"""NaN in a batch: the update is left out, and too many in a row end the run with what one needs to see why."""

import functools
import json

import pytest
import torch

from shared.run.checkpoint import first_not_finite, load_latest
from tests.reliability import faults
from tests.reliability.runs import Run, assert_same_run, log_lines, start_ranks


@pytest.mark.parametrize("flags", [(), ("--use_bn_in_head", "on")])
def test_a_single_bad_batch_is_left_out_counted_and_survives_a_kill(flags, images, tmp_path):
    fault = functools.partial(faults.nan_in_loss, {3})
    Run(tmp_path / "run", "--data_path", images, *flags, fault=fault).assert_ends()
    skipped = {line["step"]: line["skipped"] for line in log_lines(tmp_path / "run")}
    assert skipped == {2: 0, 4: 0.5, 6: 0, 8: 0, 10: 0, 12: 0}
    assert first_not_finite(load_latest(tmp_path / "run/checkpoint.pth")) is None
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    killed = Run(tmp_path / "killed", "--data_path", images, *flags, fault=functools.partial(faults.slow_steps, 0.1))
    killed.wait_for_step(2)
    killed.kill()
    Run(tmp_path / "killed", "--data_path", images, *flags, fault=fault).assert_ends()
    assert_same_run(tmp_path / "killed", tmp_path / "run")


def test_a_bad_batch_of_one_rank_is_reported_by_that_rank_and_stops_both(images, tmp_path):
    fault = functools.partial(faults.nan_in_loss, range(3, 100), 1)
    ranks = start_ranks(tmp_path / "run", 2, "--data_path", images, "--max_skipped_steps", 2, fault=fault)
    printed = [rank.assert_ends(3) for rank in ranks]
    assert "the first such tensor is the loss (rank 1)" in printed[0]
    assert torch.load(tmp_path / "run/nonfinite.pth", weights_only=True)["rank"] == 1
