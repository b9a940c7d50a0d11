import pytest

from tests.xcit.training_runs import TINY, losses
from xcit import main, run_with_submitit


@pytest.fixture
def submitted(monkeypatch):
    """The arguments that would have been submitted."""
    calls = []
    monkeypatch.setattr(run_with_submitit.slurm, "submit", lambda train, args: calls.append((train, args)))
    return calls


def test_every_training_flag_is_accepted_with_its_default(submitted):
    run_with_submitit.main(["--data-path", "images", "--nodes", "4"])
    train, args = submitted[0]
    assert train is main.train_xcit
    assert vars(main.parse_args(["--data-path", "images"])).items() <= vars(args).items()
    assert (args.nodes, args.job_name) == (4, "xcit")


def test_debug_trains_in_this_process(images, tmp_path, small_networks):
    flags = [*TINY, "--data-path", str(images), "--output_dir", str(tmp_path / "%j"), "--cluster", "debug"]
    run_with_submitit.main(flags)
    assert len(losses(tmp_path / "debug")) >= 2
