"""The real script: flags, training, the queue, resuming, several processes, copied folders."""

import argparse
import json
import math

import numpy as np
import pytest
import torch

from shared.images.resolutions import recipes_of
from shared.images.views import ViewRecipe
from swav import main_swav
from swav.flags import FLIP_COLOR_AND_BLUR
from swav.main_swav import rows_of_queue
from tests.command_lines import error_of
from tests.processes import run_processes
from tests.run_folders import lines, losses, state_of
from tests.swav.tiny import SWAV, train_on_rank
from tests.swav.tiny import train_swav as train

QUEUE = ("--queue_length", 16, "--epoch_queue_starts", 0)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run of two epochs with a queue, that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, "--data_path", images, "--epochs", 2, "--checkpoint_freq", 1, "--amp", "fp32", *QUEUE)
    return folder


def test_training_writes_the_official_files(whole):
    written = lines(whole)
    assert [line["step"] for line in written] == [1, 2, 3, 4, 5, 6]
    assert all(line["ln_k"] == pytest.approx(math.log(6)) and line["code_entropy"] < line["ln_k"] for line in written)
    health = {"code_entropy", "ln_k", "prototypes_used", "prototype_perplexity", "feature_spread", "rank_me"}
    assert health <= written[0].keys()
    for epoch in [json.loads(line) for line in (whole / "log.txt").read_text().splitlines()]:
        assert {"train_loss", "train_lr", "epoch", "prototypes_used", "dead_prototypes"} <= epoch.keys()
        assert epoch["prototypes_used"] + epoch["dead_prototypes"] == 6
    state = state_of(whole)
    assert state["epoch"] == 2 and all(name.startswith("module.") for name in state["state_dict"])
    assert set(state["optimizer"]["state"][0]) == {"momentum_buffer"}
    assert state["queue"]["embeddings"].shape == (1, 2, 16, 8)
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["ckp-0.pth", "ckp-1.pth"]


def test_codes_of_a_full_queue_use_its_rows(images, tmp_path, monkeypatch):
    rows = []
    assign = main_swav.SwappedPrediction.assign
    monkeypatch.setattr(
        main_swav.SwappedPrediction, "assign", lambda self, scores: rows.append(len(scores)) or assign(self, scores)
    )
    train(tmp_path, "--data_path", images, "--queue_length", 20, "--epoch_queue_starts", 1, "--epochs", 2)
    # no queue in epoch 0; afterwards 20 rows are rounded down to two batches, which have to be filled first
    assert rows == [8] * 6 + [8, 8, 8, 8, 24, 24]


def test_a_queue_has_whole_batches_of_all_processes(capsys):
    assert rows_of_queue(3840, 64, 4) == 960
    assert capsys.readouterr().out == ""
    assert rows_of_queue(3841, 64, 4) == 960
    assert "the queue has 3840 rows" in capsys.readouterr().out
    assert rows_of_queue(100, 64, 4) == 0
    assert "there is no queue" in capsys.readouterr().out


def test_prototypes_are_frozen_at_first_and_normalised_before_every_step(images, whole, tmp_path):
    train(tmp_path, "--data_path", images, "--freeze_prototypes_niters", 3)
    frozen, trained = (state_of(folder)["state_dict"]["module.prototypes.weight"] for folder in (tmp_path, whole))
    torch.testing.assert_close(frozen.norm(dim=1), torch.ones(6))
    assert (trained.norm(dim=1) - 1).abs().max() > 1e-5


def test_other_flags_train_too(images, tmp_path):
    flags = "--amp bf16 --in_chans 1 --hidden_mlp 0 --sync_bn apex --crops_for_assign 2 0 3 --augmentation pil"
    written = train(tmp_path, "--data_path", images, *QUEUE, *flags.split(), "--cache", "memory")
    assert len(written) == 3 and all(math.isfinite(line["loss"]) and line["skipped"] == 0 for line in written)


@pytest.mark.slow
def test_compiled_backbones_train_alike(images, tmp_path):
    for name, flags in (("eager", ()), ("compiled", ("--compile",))):
        train(tmp_path / name, "--data_path", images, "--epochs", 2, "--amp", "fp32", *QUEUE, *flags)
    torch.testing.assert_close(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=1e-4, atol=0)
    eager, compiled = (state_of(tmp_path / name)["state_dict"] for name in ("eager", "compiled"))
    assert compiled.keys() == eager.keys()  # a checkpoint of either is one of both


def test_two_processes_give_the_losses_of_one_with_twice_the_batch_and_the_same_queue(images, whole, tmp_path):
    flags = ("--data_path", images, "--epochs", 2, "--amp", "fp32", *QUEUE)
    one, two = whole, tmp_path
    run_processes(train_on_rank, 2, train, two, *flags, "--batch_size", 4)
    np.testing.assert_allclose(losses(two), losses(one), rtol=5e-4)
    assert len(losses(one)) == 6
    for key in ("prototypes_used", "assigned"):
        of_one, of_two = ([line[key] for line in lines(folder)] for folder in (one, two))
        assert of_one == of_two
    (queue,) = state_of(one)["queue"]["embeddings"]
    halves = state_of(two)["queue"]["embeddings"]  # rank r has every second image
    for batch, half in zip(queue.split(8, dim=1), halves.split(4, dim=2), strict=True):
        torch.testing.assert_close(half.permute(1, 2, 0, 3).flatten(1, 2), batch, rtol=0, atol=2e-3)
    train(two, *flags, "--epochs", 3)  # one process goes on with the queues of two
    assert state_of(two)["queue"]["embeddings"].shape == (1, 2, 16, 8)


def test_an_official_checkpoint_with_its_queue_files_is_resumed(images, whole, tmp_path):
    state = state_of(whole)
    others = {"lr": np.float64(0.5), "dampening": 0, "nesterov": False}
    groups = [group | others for group in state["optimizer"]["param_groups"]]
    optimizer = {"state": state["optimizer"]["state"], "param_groups": groups}
    official = {"epoch": 2, "state_dict": state["state_dict"], "optimizer": optimizer, "amp": {"loss_scaler0": {}}}
    torch.save(official, tmp_path / "checkpoint.pth.tar")
    torch.save({"queue": state["queue"]["embeddings"][0]}, tmp_path / "queue0.pth")
    train(tmp_path, "--data_path", images, *QUEUE, "--epochs", 3)
    found = state_of(tmp_path)
    assert found["epoch"] == 3 and found["queue"]["pushed"] == [40, 40]  # 16 rows and three batches of 8
    assert found["state_dict"].keys() == state["state_dict"].keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nmb_crops", "2"], "--nmb_crops 2"),
        (["--crops_for_assign", "0", "4"], "--crops_for_assign 0 4"),
        (["--nmb_prototypes", "1"], "--nmb_prototypes 1"),
        (["--epochs", "1", "--warmup_epochs", "2"], "--warmup_epochs 2"),
        (["--sync_bn", "pytorhc"], "pytorhc"),
        (["--arch", "resnt50"], "resnet50"),
        (["--batch_size", "5000"], "24 images on 1 process"),
        (["--epsilon", "0"], "--epsilon 0.0 is not positive"),
        (["--temperature", "0"], "--temperature 0.0 is not positive"),
        (["--queue_length", "-5"], "--queue_length -5 is less than 0"),
    ],
)
def test_bad_input_is_one_clear_message(images, tmp_path, flags, message):
    assert message in error_of(main_swav.main, *SWAV, "--data_path", images, "--dump_path", tmp_path, *flags)


# --- Views ------------------------------------------------------------------------------------------------------------


def swav_views(*values) -> list[ViewRecipe]:
    """Recipes by numbers, sides, least and largest scales of crops."""
    names = ("nmb_crops", "size_crops", "min_scale_crops", "max_scale_crops")
    args = argparse.Namespace(blur_radius=(0.1, 2.0), **dict(zip(names, values, strict=True)))
    return recipes_of(args, **FLIP_COLOR_AND_BLUR)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (([2, 6], [224], [0.14], [1.0]), "--nmb_crops 2 6, --size_crops 224"),
        (([2], [0], [0.14], [1.0]), "--size_crops 0"),
        (([1], [32], [0.14], [1.0]), "--nmb_crops 1: at least two"),
        (([2], [32], [0.9], [0.5]), "--min_scale_crops 0.9, --max_scale_crops 0.5: expected shares"),
        (([2], [32], [0.9], [5.0]), "--max_scale_crops 5.0: expected shares"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        swav_views(*flags)


def test_views_come_resolution_by_resolution():
    views = swav_views([2, 6], [224, 96], [0.14, 0.05], [1.0, 0.14])
    assert [view.size_px for view in views] == [224] * 2 + [96] * 6
    assert [view.scale for view in views] == [(0.14, 1.0)] * 2 + [(0.05, 0.14)] * 6


def test_all_views_have_the_same_colours_and_blur():
    for view in swav_views([1, 2], [32, 16], [0.14, 0.05], [1.0, 0.14]):
        assert (view.flip_p, view.jitter, view.jitter_p, view.grey_p) == (0.5, (0.8, 0.8, 0.8, 0.2), 0.8, 0.2)
        assert (view.blur_p, view.blur_radius, view.solarize_p) == (0.5, (0.1, 2.0), 0.0)
        assert (view.interpolation, view.ratio) == ("bilinear", (3 / 4, 4 / 3))
