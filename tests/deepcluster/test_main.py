"""The real script: flags, the alternation of clustering and training, official checkpoints, several processes."""

import csv
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import nn

from deepcluster import main as script
from deepcluster.hub import load_network
from deepcluster.main import parse_args, train_deepcluster
from shared.run.attempt import Interrupted, NotFinite
from shared.run.checkpoint import load_latest
from tests.command_lines import error_of
from tests.deepcluster.tiny import TINY
from tests.reliability import runs
from tests.run_folders import lines, losses, state_of
from tests.tiny_training import Training


def train(output_dir, images, *flags):
    train_deepcluster(parse_args([str(images), *TINY, "--exp", str(output_dir), *map(str, flags)]))
    return lines(output_dir)


def partitions(output_dir):
    return [line for line in lines(output_dir) if "clusters" in line]


# --- Flags ------------------------------------------------------------------------------------------------------------


# --- A run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run of two epochs of three steps."""
    folder = tmp_path_factory.mktemp("finished")
    train(folder, images)
    return folder


def test_clustering_and_training_take_turns(finished):
    kinds = ["cluster" if "clusters" in line else "train" for line in lines(finished)]
    assert kinds == ["cluster", *["train"] * 3, "cluster", *["train"] * 3, "cluster"]
    assert all(line["loss"] == pytest.approx(np.log(5), abs=0.3) for line in lines(finished) if "loss" in line)


def test_the_log_tells_sizes_and_agreement_of_the_partitions(finished, images):
    first, second, last = partitions(finished)
    assert "nmi_previous" not in first and 0 <= second["nmi_previous"] <= 1
    assert first["clusters"] + first["empty_clusters"] == 5
    assert first["smallest_cluster"] <= 24 / first["clusters"] <= first["largest_cluster"]
    with open(finished / "clusters.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["image"] for row in rows} == {str(path) for path in images.rglob("*.png")}
    expected = normalized_mutual_info_score(
        [row["class"] for row in rows], [row["cluster"] for row in rows], average_method="geometric"
    )
    assert last["nmi_labels"] == pytest.approx(expected)


def test_the_checkpoint_has_the_official_layout(finished):
    state = state_of(finished)
    assert {"epoch", "arch", "state_dict", "optimizer"} <= state.keys()
    assert state["epoch"] == 2 and state["arch"] == "test_resnet"
    heads = {name.split(".")[0] for name in state["state_dict"]}
    assert heads == {"features", "top_layer"}
    assert all(name.startswith("features.module.") for name in state["state_dict"] if name.startswith("features"))
    assert state["state_dict"]["top_layer.weight"].shape == (5, load_network(finished / "checkpoint.pth.tar").dim)
    # the top layer is not in the optimiser, which has a momentum for every other tensor that learns
    assert len(state["optimizer"]["state"]) == len(
        [p for p in load_network(finished / "checkpoint.pth.tar", keep_top_layer=False).parameters()]
    )


def test_numbered_checkpoints_count_steps(finished):
    (numbered,) = (finished / "checkpoints").iterdir()
    assert numbered.name == "checkpoint_1.pth.tar"
    assert (load_latest(numbered)["epoch"], load_latest(numbered)["step_in_epoch"]) == (1, 1)


@pytest.mark.parametrize(
    "flags", ["--clustering PIC", "--sampler official", "--kmeans torch", "--sobel --reassign 1.5", "--amp bf16"]
)
def test_the_variants_run(images, tmp_path, flags):
    written = train(tmp_path, images, "--epochs", 1, *flags.split())
    assert len([line for line in written if "loss" in line]) == (5 if "--reassign" in flags else 3)


def test_alexnet_with_dropout_runs_and_its_file_loads(images, tmp_path, small_layers):
    train(tmp_path, images, "--arch", "alexnet", "--sobel", "--crop_size", 64, "--epochs", 1)
    network = load_network(tmp_path / "checkpoint.pth.tar")
    assert network.sobel is not None and network.top_layer.out_features == 5


def test_a_flat_folder_without_classes_is_clustered(images, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for path in images.rglob("*.png"):
        shutil.copy(path, folder)
    train(tmp_path / "run", folder, "--epochs", 1)
    assert "nmi_labels" not in partitions(tmp_path / "run")[0]
    assert (tmp_path / "run/clusters.csv").read_text().splitlines()[0] == "image,cluster"


def test_too_many_components_are_an_error_before_anything_is_computed(images, tmp_path, monkeypatch):
    """They were one after the first evaluation and the features of all images."""
    monkeypatch.setattr(script, "KNNMonitor", None)
    with pytest.raises(ValueError, match="--pca_dim 25: 24 features of 96 dimensions have between 1 and 24 principal"):
        train(tmp_path, images, "--pca_dim", 25)


def test_clusters_that_teach_nothing_are_said(images, tmp_path, capsys, monkeypatch):
    embed = script.ClusterNetwork.embed
    monkeypatch.setattr(script.ClusterNetwork, "embed", lambda self, x: 0 * embed(self, x) + 1)
    train(tmp_path, images, "--epochs", 1)
    printed = capsys.readouterr().out
    assert "the features vary in 0 directions only, fewer than --pca_dim 4" in printed
    problem = next(line for line in printed.splitlines() if line.startswith("Problems"))
    assert "TRIVIAL: " in problem and "--lr" in problem


def test_gradients_that_stay_nan_end_the_run_and_name_the_new_top_layer(images, tmp_path, monkeypatch):
    make = script.new_top_layer

    def make_broken(*args):
        layer = make(*args)
        nn.init.constant_(layer.bias, torch.nan)
        return layer

    monkeypatch.setattr(script, "new_top_layer", make_broken)
    with pytest.raises(NotFinite, match=r"2 steps in a row, up to step 2, .* the first such tensor is top_layer"):
        train(tmp_path, images, "--max_skipped_steps", 2)


# --- Stopping and resuming --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [4, 8])
def test_a_signal_during_the_clustering_is_obeyed_at_once(images, tmp_path, monkeypatch, batch, finished):
    """Batches 1 to 3 are those of the first clustering, 4 to 6 of the second, 7 to 9 of the last."""
    calls = []
    embed = script.ClusterNetwork.embed

    def interrupted(self, x):
        calls.append(x)
        if len(calls) == batch:
            os.kill(os.getpid(), signal.SIGUSR1)
        return embed(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(script.ClusterNetwork, "embed", interrupted)
        with pytest.raises(Interrupted) as end:
            train(tmp_path, images)
    assert end.value.code == 128 + signal.SIGUSR1 and len(calls) == batch
    train(tmp_path, images)
    runs.assert_same_run(tmp_path, finished)


def test_an_evaluation_before_training_is_not_repeated(images, tmp_path, monkeypatch):
    flags = ("--eval_knn_freq", 1, "--val_path", images, "--epochs", 1)
    train(tmp_path / "whole", images, *flags)

    with monkeypatch.context() as patch:
        whiten = script.pca_whiten
        patch.setattr(script, "pca_whiten", lambda *args: os.kill(os.getpid(), signal.SIGUSR1) or whiten(*args))
        with pytest.raises(Interrupted):
            train(tmp_path / "run", images, *flags)
    train(tmp_path / "run", images, *flags)
    assert [line for line in lines(tmp_path / "run") if "knn_top1" in line] == [
        line for line in lines(tmp_path / "whole") if "knn_top1" in line
    ]


def test_a_finished_run_that_is_started_again_changes_nothing(images, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    train(tmp_path / "run", images)
    runs.assert_same_run(tmp_path / "run", finished)
    assert lines(tmp_path / "run") == lines(finished)


def test_more_epochs_can_follow(images, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    train(tmp_path / "run", images, "--epochs", 3)
    train(tmp_path / "whole", images, "--epochs", 3)
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_checkpoint_of_the_official_code_is_gone_on_from(images, finished, tmp_path):
    """It has no flags, clusters or log, and its optimiser state is that of another version of torch."""
    state = state_of(finished)
    official = {key: state[key] for key in ("arch", "state_dict", "optimizer")} | {"epoch": 1}
    for group in official["optimizer"]["param_groups"]:
        for name in ("fused", "foreach", "maximize", "differentiable"):
            group.pop(name, None)
        group["lr"] = 123.0
    torch.save(official, tmp_path / "official.pth.tar")
    written = train(tmp_path / "run", images, "--resume", tmp_path / "official.pth.tar")
    assert [line["epoch"] for line in written if "loss" in line] == [1, 1, 1]
    assert state_of(tmp_path / "run")["optimizer"]["param_groups"][0]["lr"] == 0.05


def test_what_does_not_fit_the_checkpoint_is_refused(images, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(ValueError, match=r"--sobel True does not fit .*--sobel False"):
        train(tmp_path / "run", images, "--sobel")
    with pytest.raises(ValueError, match="--resume /no/such/file: there is no such file"):
        train(tmp_path / "new", images, "--resume", "/no/such/file")
    other = {key: state_of(finished)[key] for key in ("arch", "state_dict", "optimizer", "epoch")}
    torch.save(other | {"arch": "alexnet"}, tmp_path / "other.pth.tar")
    with pytest.raises(ValueError, match=r"--arch test_resnet does not fit the checkpoint .* with --arch alexnet"):
        train(tmp_path / "new", images, "--resume", tmp_path / "other.pth.tar")


def test_changed_images_are_clustered_again(images, finished, tmp_path, capsys):
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "class0" / "class0_00.png").unlink()
    shutil.copytree(finished, tmp_path / "run")
    train(tmp_path / "run", folder, "--epochs", 3, "--on_changed_run", "continue")
    assert "other training images" in capsys.readouterr().out
    assert len(state_of(tmp_path / "run")["clusters"]["assignments"]) == 23


# --- Processes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_like_one(images, tmp_path):
    flags = (images, "--amp", "fp32", "--epochs", 1)
    train(tmp_path / "one", *flags)  # with the same batch in all
    ranks = runs.start_ranks(tmp_path / "run", 2, *flags, script=Training("deepcluster.main", TINY))
    for rank in ranks:
        rank.assert_ends()
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "one"), rtol=2e-3)
    first, expected = partitions(tmp_path / "run")[0], partitions(tmp_path / "one")[0]
    assert {k: v for k, v in first.items() if k != "clustering_loss"} == {
        k: v for k, v in expected.items() if k != "clustering_loss"
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--wd 0.00001", "--wd 1e-05: must be at most 0; it is a power of ten"),
        ("--k 1", "--nmb_cluster 1 is less than 2"),
        ("--reassign 0", "--reassign 0.0: must be more than 0"),
        ("/no/such/folder", "DIR /no/such/folder"),
        ("{images} --k 25", "--nmb_cluster 25: 24 images make between 1 and 24 clusters"),
        ("{images} --pca_dim 25", "--pca_dim 25: 24 features"),
        ("{images} --arch alexnt", "did you mean alexnet"),
        ("{images} --arch alexnet", "images of 32 pixels are too small for alexnet; raise --crop_size"),
    ],
)
def test_bad_input_is_one_clear_message(images, tmp_path, flags, message):
    assert message in error_of(script.main, *TINY, "--exp", tmp_path, *flags.format(images=images).split())
