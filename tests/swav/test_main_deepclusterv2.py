"""The real script: flags, memory, clusters, resuming, several processes."""

import json
import math
import os
import shutil
import signal

import pytest
import torch

from shared.run.checkpoint import Interrupted
from swav.kmeans import MemoryBank
from swav.main_deepclusterv2 import first_centroids
from tests.reliability.runs import write_images
from tests.run_folders import lines, losses, state_of
from tests.swav.tiny import train_deepclusterv2 as train


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "noise", count=26)  # the last two fill no batch


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run of two epochs that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, "--data_path", images, "--epochs", 2, "--freeze_prototypes_niters", 2)
    return folder


def test_training_writes_memory_and_clusters(whole):
    written = lines(whole)
    assert [line["step"] for line in written] == [1, 2, 3, 4, 5, 6]
    assert all(line["ln_k"] == pytest.approx(math.log(5)) and 0 < line["loss"] < 20 for line in written)
    epochs = [json.loads(line) for line in (whole / "log.txt").read_text().splitlines()]
    assert all(line["prototypes_used"] + line["dead_prototypes"] in (5, 6) for line in epochs)
    state = state_of(whole)
    assert state["memory"]["embeddings"].shape == (1, 2, 24, 8)
    indices = state["memory"]["indices"][0]
    assert len(indices.unique()) == 24  # two images of 26 are left out of every epoch
    assert state["assignments"].shape == (2, 26)
    # the clusters were made from the epoch before; 24 images have one
    assert ((state["assignments"] >= 0).sum(dim=1) == 24).all()


def test_first_centroids_depend_on_seed_epoch_and_head_only():
    drawn = [order for seed in (0, 1) for epoch in (0, 1) for order in first_centroids(seed, epoch, 2, 9)]
    orders = [tuple(order.tolist()) for order in drawn]
    assert len(set(orders)) == 8 and all(sorted(order) == list(range(9)) for order in orders)
    assert tuple(first_centroids(1, 1, 2, 9)[1].tolist()) == orders[-1]


def test_the_memory_of_a_checkpoint_or_of_the_official_files_is_used(images, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "ours")
    state = state_of(whole)
    (tmp_path / "official").mkdir()
    official = {key: state[key] for key in ("epoch", "state_dict", "optimizer")}
    torch.save(official, tmp_path / "official/checkpoint.pth.tar")
    embeddings, indices = state["memory"]["embeddings"][0], state["memory"]["indices"][0]
    memory = {"local_memory_embeddings": embeddings, "local_memory_index": indices}
    torch.save(memory, tmp_path / "official/mb0.pth")
    for name in ("ours", "official"):
        train(tmp_path / name, "--data_path", images, "--epochs", 3)
    assert "filling the memory" not in capsys.readouterr().out
    assert losses(tmp_path / "official") == losses(tmp_path / "ours")[6:]
    train(tmp_path / "ours", "--data_path", images, "--epochs", 4, "--batch_size", 7)  # other rows: a new memory
    assert "filling the memory" in capsys.readouterr().out


def test_a_signal_while_the_memory_is_filled_stops_at_once_and_changes_nothing(images, whole, tmp_path, monkeypatch):
    flags = "--data_path", images, "--epochs", 2, "--freeze_prototypes_niters", 2
    with monkeypatch.context() as patched:
        write, calls = MemoryBank.write, []

        def write_and_signal(memory, start, *batch):
            calls.append(start)
            write(memory, start, *batch)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        patched.setattr(MemoryBank, "write", write_and_signal)
        with pytest.raises(Interrupted):
            train(tmp_path, *flags)
    assert len(calls) == 2 and state_of(tmp_path)["epoch"] == 0
    train(tmp_path, *flags)
    expected, found = state_of(whole)["state_dict"], state_of(tmp_path)["state_dict"]
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_more_clusters_than_images_of_an_epoch_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match=r"--nmb_prototypes 25 is more than the 24 images"):
        train(tmp_path, "--data_path", images, "--nmb_prototypes", 25)
