import json

import pytest

from deepcluster import main, run_with_submitit
from tests.deepcluster.test_main import TINY


@pytest.fixture
def submitted(monkeypatch):
    """The arguments that would have been submitted."""
    calls = []
    monkeypatch.setattr(run_with_submitit.slurm, "submit", lambda train, args: calls.append((train, args)))
    return calls


def test_every_training_flag_is_accepted_with_its_default(submitted):
    run_with_submitit.main(["images", "--nodes", "4"])
    train, args = submitted[0]
    assert train is main.train_deepcluster
    assert vars(main.parse_args(["images"])).items() <= vars(args).items()
    assert (args.nodes, args.job_name) == (4, "deepcluster")


def test_the_embedded_data_bring_their_own_defaults(submitted):
    run_with_submitit.main(["--ngpus", "1"])
    _, args = submitted[0]
    assert args.nmb_cluster == main.EMBEDDED_DATA_DEFAULTS["nmb_cluster"] and args.sobel is True


def test_debug_trains_in_this_process(images, tmp_path):
    run_with_submitit.main([str(images), *TINY, "--epochs", "1", "--cluster", "debug", "--exp", str(tmp_path / "%j")])
    lines = [json.loads(line) for line in (tmp_path / "debug" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert (tmp_path / "debug" / "checkpoint.pth.tar").exists()
