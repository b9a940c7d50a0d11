"""What would quietly make a run worse is an error instead."""

from shared.run.checkpoint import load_latest
from tests.processes import free_port, rank_environment
from tests.reliability.runs import Run, write_images


def test_two_ranks_with_as_many_but_other_images_are_refused(images, tmp_path):
    other = write_images(tmp_path / "other")
    (other / "class0" / "0.png").rename(other / "class0" / "00.png")
    port = free_port()
    ranks = [
        Run(tmp_path / "run", "--data_path", folder, environment=rank_environment(r, 2, port))
        for r, folder in enumerate((images, other))
    ]
    for r, rank in enumerate(ranks):
        printed = rank.assert_ends(2)
        assert f"error (rank {r}): the training data (number of images, checksum) differs between processes" in printed


def test_the_data_set_may_move(images, tmp_path):
    first, second = write_images(tmp_path / "here"), write_images(tmp_path / "there")
    Run(tmp_path / "run", "--data_path", first, "--epochs", 1).assert_ends()
    printed = Run(tmp_path / "run", "--data_path", second, "--epochs", 2, "--on_changed_run", "refuse").assert_ends()
    assert "resuming at epoch 1, step 0" in printed
    assert load_latest(tmp_path / "run/checkpoint.pth")["epoch"] == 2
