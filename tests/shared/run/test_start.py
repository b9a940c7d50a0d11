import argparse

import pytest
import torch

from shared.run import flags
from shared.run.attempt import Attempt, Superseded, owner_of
from shared.run.start import start_run


def flags_of_a_run(output_dir, seed=5):
    parser = argparse.ArgumentParser()
    flags.add_run_flags(parser)
    parser.set_defaults(output_dir=str(output_dir), seed=seed)
    return parser.parse_args(["--device", "cpu"])


def test_a_run_has_its_seed_and_owns_its_folder(tmp_path):
    device, output_dir = start_run(flags_of_a_run(tmp_path / "run"), "checkpoints")
    drawn = torch.rand(3)
    assert device == torch.device("cpu") and (output_dir / "checkpoints").is_dir()
    assert owner_of(output_dir) == Attempt.current()
    start_run(flags_of_a_run(tmp_path / "run"))
    assert torch.equal(torch.rand(3), drawn)
    start_run(flags_of_a_run(tmp_path / "run", seed=6))
    assert not torch.equal(torch.rand(3), drawn)


def test_an_attempt_leaves_a_folder_alone_that_a_later_one_owns(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    Attempt.current().claim(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(Superseded):
        start_run(flags_of_a_run(tmp_path))
