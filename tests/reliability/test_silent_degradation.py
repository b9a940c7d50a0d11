"""What would quietly make a run worse is an error instead."""

import pytest

from shared.run.checkpoint import load_latest
from tests.processes import free_port, rank_environment
from tests.reliability.runs import Run, write_images


def test_a_val_folder_with_other_classes_is_refused(images, tmp_path):
    val = write_images(tmp_path / "val", count=6)
    (val / "class2").rename(val / "class3")
    run = Run(tmp_path / "run", "--data_path", images, "--val_path", val, "--eval_knn_freq", 1)
    printed = run.assert_ends(2)
    assert f"error: {val} has other classes than {images}" in printed
    assert "missing class2, additional class3" in printed and "Traceback" not in printed


def test_fewer_images_than_a_batch_are_refused(images, tmp_path):
    printed = Run(tmp_path / "run", "--data_path", images, "--batch_size_per_gpu", 25).assert_ends(2)
    assert "error: 24 images on 1 process(es) do not fill one batch of 25" in printed


def test_processes_that_do_not_come_up_are_an_error_and_not_a_smaller_run(images, tmp_path):
    environment = rank_environment(1, 2, free_port())
    run = Run(tmp_path / "run", "--data_path", images, "--dist_timeout", 2, environment=environment)
    printed = run.assert_ends(4)
    assert "error: rank 1 of 2 could not form the process group at 127.0.0.1" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize("choice", ["same_data", "continue"])
def test_images_that_changed_since_the_checkpoint_are_stated_or_refused(choice, images, uninterrupted, tmp_path):
    mine = write_images(tmp_path / "images")
    Run(tmp_path / "run", "--data_path", mine, "--epochs", 1).assert_ends()
    again = ("--data_path", mine, "--epochs", 1, "--on_changed_run", choice)
    assert "changed run" not in Run(tmp_path / "run", *again).assert_ends()
    (mine / "class0" / "0.png").rename(mine / "class0" / "00.png")
    printed = Run(tmp_path / "run", *again).assert_ends(2 if choice == "same_data" else 0)
    assert "other training images, or the same under other names" in printed


def test_the_data_set_may_move(images, tmp_path):
    first, second = write_images(tmp_path / "here"), write_images(tmp_path / "there")
    Run(tmp_path / "run", "--data_path", first, "--epochs", 1).assert_ends()
    printed = Run(tmp_path / "run", "--data_path", second, "--epochs", 2, "--on_changed_run", "refuse").assert_ends()
    assert "resuming at epoch 1, step 0" in printed
    assert load_latest(tmp_path / "run/checkpoint.pth")["epoch"] == 2


def test_a_network_that_gives_zero_features_is_refused_by_the_monitor(images, tmp_path):
    run = Run(tmp_path / "run", "--data_path", images, "--eval_knn_freq", 1, fault=zero_features)
    printed = run.assert_ends(2)
    assert "feature vectors are all zeros" in printed and "Traceback" not in printed


def zero_features():
    from dino.vision_transformer import VisionTransformer

    forward = VisionTransformer.forward
    VisionTransformer.forward = lambda self, images: 0 * forward(self, images)
