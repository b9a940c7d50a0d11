"""The real script: flags, training, official checkpoints, several processes."""

import argparse
import json
import math
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dino import hub, main_dino
from dino.hub import load_pretrained
from dino.main_dino import parse_args, train_dino
from shared.run.checkpoint import load_latest
from tests.command_lines import error_of
from tests.dino.tiny import FLAGS, shrink_networks
from tests.reliability.runs import assert_same, start_ranks
from tests.run_folders import lines, losses, state_of, stopped_after
from tests.tiny_training import Training

TINY = [*FLAGS.split(), *"--arch vit_tiny --batch_size_per_gpu 8 --epochs 1 --log_freq 1".split()]
TINY += "--drop_path_rate 0.1 --saveckp_freq 0 --saveckp_steps 0".split()


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """Networks of 40 thousand parameters."""
    for name in ("build_backbone", "DINOHead"):
        monkeypatch.setattr(main_dino, name, getattr(main_dino, name))  # what is put back in the end
    shrink_networks()


def train(output_dir, *flags):
    train_dino(parse_args([*TINY, "--output_dir", str(output_dir), *map(str, flags)]))
    return lines(output_dir)


def assert_same_state(a, b):
    for key in ("student", "teacher", "dino_loss", "epoch", "step_in_epoch"):
        assert_same(a[key], b[key], key)
    assert_same(a["optimizer"]["state"], b["optimizer"]["state"], "optimizer")


def test_training_writes_the_official_checkpoint_layout(images, tmp_path, monkeypatch):
    monkeypatch.undo()  # the networks that the flags name
    written = train(tmp_path, "--data_path", images, "--saveckp_freq", 1)
    assert [line["step"] for line in written] == [1, 2, 3]
    assert abs(written[0]["loss"] - math.log(32)) < 0.5
    health = {"teacher_entropy", "kl", "ln_k", "feature_spread", "rank_me"}
    assert health | {"images_per_s", "data_wait"} <= written[0].keys()
    epoch = json.loads((tmp_path / "log.txt").read_text())
    assert {"train_loss", "train_lr", "train_wd", "epoch"} <= epoch.keys()
    state = state_of(tmp_path)
    assert {"student", "teacher", "optimizer", "epoch", "args", "dino_loss", "fp16_scaler"} <= state.keys()
    assert state["epoch"] == 1 and state["dino_loss"]["center"].shape == (1, 32)
    assert all(name.startswith("module.") for name in state["student"])
    assert {name.split(".")[0] for name in state["teacher"]} == {"backbone", "head"}
    assert load_latest(tmp_path / "checkpoint0000.pth")["epoch"] == 1


def test_class_folders_are_listed_once_for_the_training_and_its_evaluations(images, tmp_path, monkeypatch):
    folders = [shutil.copytree(images, tmp_path / "images"), *(tmp_path / "images").iterdir()]
    for folder in folders:
        os.utime(folder, (0, time.time() - 60))
    listed, scandir = Counter(), os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: [listed.update([Path(path)]), scandir(path)][1])
    flags = ("--eval_knn_freq", 1, "--value_range", 0, 255)
    assert {"knn_top1", "recall_at_1"} <= train(tmp_path / "run", "--data_path", folders[0], *flags)[0].keys()
    assert {folder.name: listed[folder] for folder in folders[1:]} == {"class0": 1, "class1": 1, "class2": 1}


@pytest.mark.parametrize("arch", ["shufflenet_v2_x0_5", "test_vit"])
def test_networks_of_the_libraries_train_and_their_checkpoints_are_evaluated(arch, images, tmp_path, monkeypatch):
    monkeypatch.setattr(main_dino, "build_backbone", hub.build_backbone)
    flags = ("--arch", arch, "--optimizer", "sgd", "--global_crop_size", 32, "--local_crop_size", 16)
    written = train(tmp_path, "--data_path", images, *flags, "--in_chans", 1)
    assert len(written) == 3 and all(math.isfinite(line["loss"]) for line in written)
    teacher = state_of(tmp_path)["teacher"]
    assert all(name.startswith("module.") for name in teacher) == (arch != "test_vit")  # batch norms
    backbone, embed_dim = load_pretrained(arch, 16, tmp_path / "checkpoint.pth")
    assert backbone(torch.zeros(2, 1, 32, 32)).shape == (2, embed_dim)


def test_two_processes_give_the_losses_of_one_with_twice_the_batch(images, tmp_path):
    """With the variables that torchrun sets; torchrun itself is started in tests/reliability/test_ranks.py."""
    flags = ["--data_path", images, "--drop_path_rate", 0, "--epochs", 2, "--amp", "fp32"]
    train(tmp_path / "one", *flags, "--batch_size_per_gpu", 8)
    script = Training("dino.main_dino", tuple(TINY), prepare=shrink_networks)
    for rank in start_ranks(tmp_path / "two", 2, *flags, "--batch_size_per_gpu", 4, script=script):
        rank.assert_ends()
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-4)
    assert len(losses(tmp_path / "one")) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher_temp", "0"], "--teacher_temp 0.0 is not positive"),
        (["--momentum_teacher", "1.5"], "--momentum_teacher 1.5 is not in [0, 1]"),
        (["--patch_size", "32"], "--global_crop_size 16 is less than --patch_size 32"),
        (["--local_crop_size", "4"], "--local_crop_size 4 is less than --patch_size 8"),
        (["--eval_knn_freq", "1", "--val_path", "/no/such/folder"], "--val_path /no/such/folder"),
        (["--batch_size_per_gpu", "5000"], "1920 images on 1 process"),
        (["--arch", "vit_smal"], "vit_small"),
        (["--device", "cuda"], "--device cuda"),
        (["--global_crops_scale", "0.5", "0.4"], "--global_crops_scale 0.5 0.4"),
        (["--local_crops_scale", "0", "1"], "--local_crops_scale 0.0 1.0"),
    ],
)
def test_bad_input_is_one_clear_message(tmp_path, flags, message, monkeypatch):
    if flags[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.undo()  # the networks that the flags name
    assert message in error_of(main_dino.main, *TINY, "--output_dir", tmp_path, *flags)


@pytest.mark.parametrize(
    ("arch", "patch", "side"), [("vit_micro", 4, 32), ("deit_small", 4, 16), ("resnet18", None, 32)]
)
def test_without_images_views_are_as_large_as_a_network_can_learn_from_in_minutes(arch, patch, side, monkeypatch):
    monkeypatch.undo()
    args = main_dino.parse_args(["--arch", arch])
    assert (args.global_crop_size, args.local_crop_size) == (side, side // 2)
    assert patch is None or args.patch_size == patch
    args = main_dino.parse_args(["--arch", arch, "--data_path", "images"])
    assert (args.patch_size, args.global_crop_size, args.lr) == (16, 224, 0.0005)
    assert main_dino.parse_args(["--arch", arch, "--global_crop_size", "24"]).global_crop_size == 24


def as_the_official_code_saves(state: dict) -> dict:
    """Flags in a Namespace, an optimiser that is not fused, nothing of ours."""
    groups = [
        {key: value for key, value in group.items() if key not in ("fused", "foreach")}
        for group in state["optimizer"]["param_groups"]
    ]
    return {
        **{key: state[key] for key in ("student", "teacher", "epoch", "dino_loss")},
        "optimizer": {"state": state["optimizer"]["state"], "param_groups": groups},
        "args": argparse.Namespace(**state["args"]),
    }


def test_a_checkpoint_of_the_official_code_is_gone_on_with(images, tmp_path):
    flags = ("--data_path", images, "--epochs", 2)
    train(tmp_path / "whole", *flags, "--saveckp_freq", 1)
    (tmp_path / "resumed").mkdir()
    state = load_latest(tmp_path / "whole" / "checkpoint0000.pth")
    torch.save(as_the_official_code_saves(state), tmp_path / "resumed" / "checkpoint.pth")
    train(tmp_path / "resumed", *flags, "--arch", "deit_tiny")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")[3:]
    assert_same_state(state_of(tmp_path / "resumed"), state_of(tmp_path / "whole"))

    del state["student"]["module.backbone.cls_token"]
    (tmp_path / "other").mkdir()
    torch.save(as_the_official_code_saves(state), tmp_path / "other" / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"the checkpoint's student does not fit this run: .*backbone\.cls_token"):
        train(tmp_path / "other", *flags)


def test_a_run_without_labels_is_measured_told_and_resumed_exactly(images, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(images.rglob("*.png"))):
        shutil.copy(path, flat / f"{i}.png")

    def run(name):
        flags = (*TINY, "--data_path", flat, "--epochs", 2, "--saveckp_steps", 1, "--output_dir", tmp_path / name)
        args = parse_args([*map(str, flags)])
        args.eval_knn_freq = None
        train_dino(args)

    run("whole")
    printed = capsys.readouterr().out
    with stopped_after(4):
        run("killed")
    run("killed")
    assert_same_state(state_of(tmp_path / "killed"), state_of(tmp_path / "whole"))
    whole, killed = (
        [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait")} for line in lines(tmp_path / name)]
        for name in ("whole", "killed")
    )
    assert killed == whole
    measured = [line for line in whole if "recall_at_1" in line]
    assert [line["step"] for line in measured] == [0, 3, 6] and all(line["rankme"] >= 1 for line in measured)
    assert f"measures without labels: 24 images of {flat}, which the training sees too" in printed
    sentence = printed.split("found again from a mirrored half, 24 images of ")[1]
    for part in ("with random weights", "of raw pixels", "after 6 steps (chance 4.2 %): ", "RankMe, effective dimen"):
        assert part in sentence


def test_knn_of_images_some_of_which_are_unreadable(images, tmp_path, capsys):
    val = shutil.copytree(images, tmp_path / "val")
    broken = val / "class1" / "22.png"
    broken.write_bytes(broken.read_bytes()[:100])
    flags = ("--data_path", images, "--val_path", val, "--eval_knn_freq", 1)
    written = train(tmp_path / "run", *flags, "--local_crop_size", 11)
    assert [line["step"] for line in written if "knn_top1" in line] == [0, 3]
    assert (tmp_path / "run" / "bad_images_val.txt").read_text().startswith(f"{broken}\t")
    printed = capsys.readouterr().out
    assert "--patch_size 8 does not divide --local_crop_size 11; the last 3 rows and columns" in printed
    assert "python dino/eval_knn.py" in printed and str(tmp_path / "run" / "checkpoint.pth") in printed
