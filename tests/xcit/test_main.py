"""The real script: flags, fine-tuning, evaluation; and the supervised loop that it shares with other methods."""

import argparse
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

from shared.images.decode import ImageError
from shared.run.checkpoint import Checkpointer
from tests.command_lines import error_of
from tests.processes import run_processes
from tests.reliability.runs import assert_same
from tests.run_folders import lines, losses, state_of
from tests.xcit.tiny import FLAGS, train, train_on_rank
from xcit import main

SOFT = "--distillation-type soft"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-size 7", "--batch-size 7"),
        ("--smoothing 1.5", "--smoothing 1.5 is not in [0, 1]"),
        ("--distillation-type hard", "--teacher-path"),
        ("--data_path /no/such/folder", "--data_path /no/such/folder"),
        ("--model xcit_small_12_p32", "did you mean xcit_small_12"),
        ("--eval", "checkpoint.pth is neither a file nor a release"),
        ("--resume nowhere.pth", "--resume nowhere.pth"),
        ("--pretrained nowhere.pth", "--pretrained nowhere.pth is neither a file nor a release"),
        ("--sched plateau", "--sched plateau"),
        ("--opt nonsense", "--opt nonsense"),
        ("--opt-betas 0.9", "--opt adamw: "),
        ("--aa nonsense", "--aa nonsense"),
        ("--clip-grad 0", "--clip_grad 0.0 is not positive"),
        (f"{SOFT} --teacher-path t --distillation-tau 0", "--distillation_tau 0.0 is not positive"),
        ("--cutmix-minmax 0.9 0.1", "--cutmix-minmax 0.9 0.1"),
        ("--drop 2", "--drop 2.0 is not in [0, 1)"),
        ("--no-model-ema", "--eval-ema"),
        ("--start_epoch 2", "--start_epoch 2 leaves nothing of --epochs 2"),
        (f"{SOFT} --teacher-model test_resnet --teacher-path nowhere.pth", "--teacher-path nowhere.pth is not a file"),
        (f"{SOFT} --teacher-path {__file__} --teacher-model resnet", "resnet is unknown; did you mean resnet50"),
    ],
)
def test_bad_input_is_one_clear_message(flags, message, images, tmp_path, small_networks):
    given = (*FLAGS.split(), "--data_path", images, "--output_dir", tmp_path)
    assert message in error_of(main.main, *given, *flags.split())


def test_training_writes_log_and_official_checkpoint_layout(finished):
    state = state_of(finished)
    assert {"model", "optimizer", "epoch", "model_ema", "scaler", "args"} <= state.keys()
    assert state["epoch"] == 2 and state["model"].keys() == state["model_ema"].keys()
    assert (finished / "best_model.pth").exists()
    epochs = [json.loads(line) for line in (finished / "log.txt").read_text().splitlines()]
    assert len(epochs) == 2 and {"train_loss", "train_lr", "test_acc1", "test_acc5", "n_parameters"} <= epochs[1].keys()
    assert [line["step"] for line in lines(finished) if "loss" in line] == list(range(1, len(losses(finished)) + 1))
    # mixed labels of three classes: an untrained network is at ln 3
    assert abs(losses(finished)[0] - math.log(3)) < 0.3


def as_the_official_code_saves(state: dict) -> dict:
    """Flags in a Namespace, the number of the finished epoch, an optimiser that is not fused, nothing of ours."""
    groups = [
        {key: value for key, value in group.items() if key not in ("fused", "foreach")}
        for group in state["optimizer"]["param_groups"]
    ]
    return {
        "model": state["model"],
        "optimizer": {"state": state["optimizer"]["state"], "param_groups": groups},
        "lr_scheduler": {"decay_rate": 1.0},
        "epoch": state["epoch"] - 1,
        "model_ema": state["model_ema"],
        "scaler": {},
        "args": argparse.Namespace(**state["args"]),
    }


def test_a_checkpoint_of_the_official_code_is_gone_on_with(finished, images, tmp_path, small_networks, monkeypatch):
    after_epoch = Checkpointer.after_epoch

    def stop_after_save(*args):
        after_epoch(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # after one epoch of two
        patch.setattr(Checkpointer, "after_epoch", stop_after_save)
        train(tmp_path / "first", "--data_path", images)
    state, official = state_of(tmp_path / "first"), tmp_path / "official.pth"
    torch.save(as_the_official_code_saves(state), official)
    train(tmp_path / "resumed", "--data_path", images, "--resume", official)
    assert losses(tmp_path / "resumed") == losses(finished)[len(losses(finished)) // 2 :]
    for key in ("model", "model_ema"):
        assert_same(state_of(tmp_path / "resumed")[key], state_of(finished)[key], key)
    torch.save(state["model"], tmp_path / "flat.pth")  # the layout of released files
    with pytest.raises(ValueError, match="holds weights, no training state: give it as --pretrained"):
        train(tmp_path / "flat", "--data_path", images, "--resume", tmp_path / "flat.pth")


def test_another_optimiser_than_the_checkpoints_is_refused(finished, images, tmp_path, small_networks):
    run = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(ValueError, match=r"--opt momentum does not fit the checkpoint in .* --opt adamw"):
        train(run, "--data_path", images, "--opt", "momentum", "--epochs", 3)


def test_eval_repeats_the_last_evaluation_and_leaves_the_folder_alone(finished, images, capsys, small_networks):
    (finished / "attempt.json").write_text('{"job": "a run that is going on", "number": 0}')
    last = [line for line in lines(finished) if "test_acc1" in line][-1]
    train(finished, "--data_path", images, "--eval", "--full_crop")
    train(finished, "--data_path", images, "--eval", "--batch-size", 5, "--distillation-type", "hard")
    printed = capsys.readouterr().out
    assert f"top-1 {last['test_acc1']:.2f} %, top-5 100.00 %" in printed.splitlines()[-1]
    train(finished, "--data_path", images, "--eval", "--checkpoint_key", "model_ema")
    assert "top-1" in capsys.readouterr().out.splitlines()[-1]
    train(finished, "--data_path", images, "--eval", "--input-size", 24)
    printed = capsys.readouterr().out
    assert "--eval with --input-size 24, the training had 16" in printed and "top-1" in printed
    train(finished, "--eval", "--val_path", images)  # needs no training images
    assert f"{images}: 24 images, 3 classes: top-1" in capsys.readouterr().out
    assert "going on" in (finished / "attempt.json").read_text()


def test_eval_of_a_network_without_a_fitting_classifier_is_refused(finished, images, tmp_path, small_networks):
    state = state_of(finished)["model"]
    del state["head.weight"], state["head.bias"]
    torch.save(state, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="no classifier for the 3 classes"):
        train(tmp_path / "run", "--data_path", images, "--eval", "--pretrained", tmp_path / "backbone.pth")


def test_finetuning_at_a_higher_resolution_and_for_other_classes(finished, images, tmp_path, small_networks, capsys):
    two = shutil.copytree(images, tmp_path / "two")
    shutil.rmtree(two / "class2")
    flags = ("--pretrained", finished / "best_model.pth", "--input-size", 40, "--lr", 0, "--warmup-lr", 0)
    written = train(tmp_path / "run", "--data_path", two, *flags, "--min-lr", 0, "--epochs", 1)
    assert "its classifier is for other classes" in capsys.readouterr().out
    before, after = (state_of(folder)["model"] for folder in (finished, tmp_path / "run"))
    assert after["head.weight"].shape == (2, 32)
    assert torch.equal(after["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])
    assert "ema_acc1" in written[-1]


def test_surgery_keeps_the_patch_embedding_as_it_was(finished, images, tmp_path, small_networks):
    train(tmp_path, "--data_path", images, "--surgery", finished / "checkpoint.pth")
    before, after = (state_of(folder)["model"] for folder in (finished, tmp_path))
    for name in before:
        if name.startswith("patch_embed"):
            assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["blocks.0.attn.qkv.weight"], after["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    "flags",
    [
        ("--mixup", 0, "--cutmix", 1.0),  # soft labels without Mixup
        ("--mixup", 0, "--cutmix", 0, "--opt", "lamb", "--in_chans", 1, "--input-size", 33, "--remode", "const"),
        ("--repeated-aug", "--aa", "none", "--model-ema-force-cpu", "--opt", "momentum", "--sched", "step"),
        ("--model", "test_vit", "--input-size", 32),
        ("--amp", "bf16", "--drop-path", 0.1, "--drop", 0.1),
    ],
)
def test_other_recipes_and_networks_train(flags, images, tmp_path, small_networks):
    train(tmp_path, "--data_path", images, "--epochs", 1, *flags)
    assert len(losses(tmp_path)) >= 2 and all(map(math.isfinite, losses(tmp_path)))


def test_two_processes_give_the_losses_of_one_with_twice_the_batch(images, tmp_path, small_networks):
    # batch statistics are those of both processes; what is drawn per process is off
    flags = ("--data_path", images, "--mixup", 0, "--cutmix", 0, "--drop-path", 0, "--lr", 0.01, "--amp", "fp32")
    train(tmp_path / "one", *flags, "--batch-size", 8)
    run_processes(train_on_rank, 2, tmp_path / "two", *flags)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-4)
    results = [[line["test_acc1"] for line in lines(tmp_path / name) if "test_acc1" in line] for name in ("one", "two")]
    assert results[0] == results[1] and len(results[0]) == 2


@pytest.mark.slow
def test_compiled_networks_train_alike(images, tmp_path, small_networks):
    for name, flags in (("eager", ()), ("compiled", ("--compile",))):
        train(tmp_path / name, "--data_path", images, "--epochs", 1, "--drop-path", 0, "--amp", "fp32", *flags)
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=1e-3)
    assert state_of(tmp_path / "compiled")["model"].keys() == state_of(tmp_path / "eager")["model"].keys()


def test_val_images_of_other_classes_and_unreadable_ones(images, tmp_path, small_networks, capsys):
    """Refused, or scored over the classes that both parts have; replaced and counted."""
    folder = tmp_path / "data"
    for part in ("train", "val"):
        shutil.copytree(images, folder / part)
    (folder / "val/class0").rename(folder / "val/zebra")
    data, shared = ("--data_path", folder, "--epochs", 1), ("--shared_classes_only", "true")
    with pytest.raises(ValueError, match="additional zebra; --shared_classes_only true scores over the 2 classes"):
        train(tmp_path / "run", *data)
    train(tmp_path / "run", *data, *shared)
    assert "left out 1 classes only in val: zebra" in capsys.readouterr().out

    broken = sorted((folder / "val/class1").iterdir())[0]
    broken.write_bytes(b"")
    named = ("--data_path", folder / "train", "--val_path", folder / "val", "--eval", *shared)
    train(tmp_path / "run", *named)  # the names of the classes are those of the images that were learned from
    printed = capsys.readouterr().out
    assert re.search(r"val: 16 images, 3 classes: top-1 \d", printed)
    assert f"1 of 16 images of {folder / 'val'} cannot be read, the first is {broken}; others take" in printed
    with pytest.raises(ImageError, match=str(broken)):
        train(tmp_path / "run", *named, "--on_bad_image", "error")
