"""The real script: flags, training, resuming, several processes, copied folders."""

import argparse
import json
import math
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino import hub, main_dino
from dino.hub import load_pretrained
from dino.main_dino import get_args_parser, parse_args, train_dino
from shared.images.decode import ImageError
from shared.run.checkpoint import load_latest
from tests.command_lines import assert_values_arrive
from tests.dino.small_data import picture, write_image
from tests.dino.tiny import shrink_networks
from tests.processes import run_script
from tests.reliability.runs import start_ranks
from tests.standalone import load_alone
from tests.tiny_training import Training

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--arch vit_tiny --patch_size 8 --global_crop_size 16 --local_crop_size 8 --local_crops_number 2 --out_dim 32 "
    "--batch_size_per_gpu 8 --warmup_epochs 0 --epochs 1 --num_workers 0 --log_freq 1 --eval_knn_freq 0 --pictures off "
    "--device cpu --saveckp_freq 0"
).split()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 small noise images in three class folders: three steps of 8."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(24):
        path = folder / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return folder


def use_small_networks(monkeypatch):
    """Networks of 40 thousand parameters."""
    for name in ("build_backbone", "DINOHead"):
        monkeypatch.setattr(main_dino, name, getattr(main_dino, name))  # what is put back in the end
    shrink_networks()


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    use_small_networks(monkeypatch)


def train(output_dir, *flags):
    train_dino(parse_args([*TINY, "--output_dir", str(output_dir), *map(str, flags)]))
    return lines(output_dir)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run of two epochs with a checkpoint after every step, that nothing has stopped."""
    with pytest.MonkeyPatch.context() as patch:
        use_small_networks(patch)
        folder = tmp_path_factory.mktemp("whole")
        train(folder, "--data_path", images, "--epochs", 2, "--saveckp_steps", 1, "--drop_path_rate", 0.2)
    return folder


def lines(output_dir):
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir):
    return [line["loss"] for line in lines(output_dir) if "loss" in line]


def state_of(output_dir):
    return load_latest(Path(output_dir) / "checkpoint.pth")


def assert_same_state(a, b):
    for key in ("student", "teacher", "dino_loss"):
        assert a[key].keys() == b[key].keys()
        for name in a[key]:
            assert torch.equal(a[key][name], b[key][name]), f"{key} {name}"
    for index, moments in a["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, b["optimizer"]["state"][index][name]), f"moment {name} of parameter {index}"
    assert (a["epoch"], a["step_in_epoch"]) == (b["epoch"], b["step_in_epoch"])


# the command lines of the paper's repository, flag by flag as published
PUBLISHED = [
    "--arch vit_small --data_path /imagenet/train --output_dir /run",
    "--arch deit_small --data_path /imagenet/train --output_dir /run --local_rank 3",
    "--arch vit_small --data_path /imagenet/train --output_dir /run --local-rank=0 --epochs 300 "
    "--teacher_temp 0.07 --warmup_teacher_temp_epochs 30 --norm_last_layer false",
    "--arch resnet50 --optimizer sgd --lr 0.03 --weight_decay 1e-4 --weight_decay_end 1e-4 --global_crops_scale 0.14 1 "
    "--local_crops_scale 0.05 0.14 --data_path /imagenet/train --output_dir /run",
    "--arch vit_small --patch_size 16 --out_dim 65536 --momentum_teacher 0.996 --use_bn_in_head false --use_fp16 True "
    "--clip_grad 0 --batch_size_per_gpu 64 --freeze_last_layer 1 --warmup_epochs 10 --min_lr 1e-5 --drop_path_rate 0.1 "
    "--local_crops_number 8 --saveckp_freq 20 --seed 0 --num_workers 10 --dist_url env:// --data_path /imagenet/train",
]


@pytest.mark.parametrize("command", PUBLISHED)
def test_published_command_lines_parse(command):
    args = parse_args(command.split())
    assert_values_arrive(get_args_parser(), command.split(), args, changed=("--arch",))
    assert args.arch in ("vit_small", "resnet50")  # deit_small is the old name


def test_defaults_are_the_official_ones():
    args = vars(parse_args(["--data_path", "/imagenet/train"]))
    official = {
        "arch": "vit_small", "patch_size": 16, "out_dim": 65536, "norm_last_layer": True, "momentum_teacher": 0.996,
        "use_bn_in_head": False, "warmup_teacher_temp": 0.04, "teacher_temp": 0.04, "warmup_teacher_temp_epochs": 0,
        "use_fp16": True, "weight_decay": 0.04, "weight_decay_end": 0.4, "clip_grad": 3.0, "batch_size_per_gpu": 64,
        "epochs": 100, "freeze_last_layer": 1, "lr": 0.0005, "warmup_epochs": 10, "min_lr": 1e-6, "optimizer": "adamw",
        "drop_path_rate": 0.1, "global_crops_scale": (0.4, 1.0), "local_crops_number": 8,
        "local_crops_scale": (0.05, 0.4), "output_dir": ".", "saveckp_freq": 20, "seed": 0, "dist_url": "env://",
        "local_rank": 0, "global_crop_size": 224, "local_crop_size": 96,
    }  # fmt: skip
    assert {name: args[name] for name in official} == official


def test_training_writes_the_official_checkpoint_layout(images, tmp_path, monkeypatch):
    monkeypatch.undo()  # the networks that the flags name
    written = train(tmp_path, "--data_path", images, "--saveckp_freq", 1)
    assert [line["step"] for line in written] == [1, 2, 3]
    assert abs(written[0]["loss"] - math.log(32)) < 0.5
    assert {"teacher_entropy", "kl", "ln_k", "feature_spread", "rank_me", "images_per_s", "data_wait"} <= written[
        0
    ].keys()
    epoch = json.loads((tmp_path / "log.txt").read_text())
    assert {"train_loss", "train_lr", "train_wd", "epoch"} <= epoch.keys()
    state = state_of(tmp_path)
    assert {"student", "teacher", "optimizer", "epoch", "args", "dino_loss", "fp16_scaler"} <= state.keys()
    assert state["epoch"] == 1 and state["dino_loss"]["center"].shape == (1, 32)
    assert all(name.startswith("module.") for name in state["student"])
    assert {name.split(".")[0] for name in state["teacher"]} == {"backbone", "head"}
    assert load_latest(tmp_path / "checkpoint0000.pth")["epoch"] == 1


@pytest.mark.parametrize("arch", ["shufflenet_v2_x0_5", "xcit_nano_12_p16", "test_vit"])
def test_networks_of_torchvision_and_timm_train_and_their_checkpoints_are_evaluated(
    arch, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(main_dino, "build_backbone", hub.build_backbone)
    flags = ("--arch", arch, "--optimizer", "sgd", "--global_crop_size", 32, "--local_crop_size", 16)
    written = train(tmp_path, "--data_path", images, *flags, "--in_chans", 1)
    assert len(written) == 3 and all(math.isfinite(line["loss"]) for line in written)
    teacher = state_of(tmp_path)["teacher"]
    assert all(name.startswith("module.") for name in teacher) == (arch != "test_vit")  # batch norms
    backbone, embed_dim = load_pretrained(arch, 16, tmp_path / "checkpoint.pth")
    assert backbone(torch.zeros(2, 1, 32, 32)).shape == (2, embed_dim)


def test_the_loss_log_does_not_depend_on_the_number_of_workers(images, tmp_path):
    for workers in (0, 2):
        train(tmp_path / str(workers), "--data_path", images, "--num_workers", workers)
    assert losses(tmp_path / "0") == losses(tmp_path / "2")


@pytest.mark.slow
def test_compiled_backbones_train_alike(images, tmp_path):
    for name, flags in (("eager", ()), ("compiled", ("--compile",))):
        # compiled code draws other numbers for dropped paths
        train(tmp_path / name, "--data_path", images, "--epochs", 2, "--drop_path_rate", 0, *flags)
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=1e-4)
    assert state_of(tmp_path / "compiled")["student"].keys() == state_of(tmp_path / "eager")["student"].keys()


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_a_run_stopped_anywhere_ends_like_an_uninterrupted_one(images, whole, tmp_path, monkeypatch, stop_after):
    flags = ("--data_path", images, "--epochs", 2, "--saveckp_steps", 1, "--drop_path_rate", 0.2)
    update, calls = main_dino.ema_update_, []

    def stop(*args):
        calls.append(args)
        if len(calls) > stop_after:
            raise Stop
        update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(main_dino, "ema_update_", stop)
        with pytest.raises(Stop):
            train(tmp_path, *flags)
    train(tmp_path, *flags, "--num_workers", 1)
    assert losses(tmp_path) == losses(whole)
    assert_same_state(state_of(tmp_path), state_of(whole))
    assert (tmp_path / "log.txt").read_text() == (whole / "log.txt").read_text()


def test_two_processes_give_the_losses_of_one_with_twice_the_batch(images, tmp_path):
    """With the variables that torchrun sets; torchrun itself is started in tests/reliability/test_ranks.py."""
    flags = ["--data_path", images, "--drop_path_rate", 0, "--epochs", 2, "--amp", "fp32"]
    train(tmp_path / "one", *flags, "--batch_size_per_gpu", 8)
    script = Training("dino.main_dino", tuple(TINY), prepare=shrink_networks)
    for rank in start_ranks(tmp_path / "two", 2, *flags, "--batch_size_per_gpu", 4, script=script):
        rank.assert_ends()
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-4)
    assert len(losses(tmp_path / "one")) == 6


@pytest.mark.parametrize("command", [["main_dino.py"], ["main.py"], ["-m", "dino.main_dino"]])
def test_every_way_to_start_the_script_works_in_a_copied_folder(images, tmp_path, command):
    """The method's folder with ``shared/`` beside it, below a folder of another name, is all it takes."""
    project = tmp_path / "some" / "project"
    for folder in ("dino", "shared"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    cwd = project if command[0] == "-m" else project / "dino"
    flags = [*TINY, "--batch_size_per_gpu", 24, "--data_path", images, "--output_dir", tmp_path / "run"]
    run = run_script(*command, *flags, cwd=cwd)
    assert run.returncode == 0, run.stderr
    assert len(losses(tmp_path / "run")) == 1


def test_the_network_file_needs_torch_alone(tmp_path):
    vision_transformer = load_alone(ROOT / "dino" / "vision_transformer.py", tmp_path)
    assert vision_transformer.vit_tiny()(torch.zeros(1, 3, 32, 32)).shape == (1, 192)


def test_help_names_every_flag_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(["--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "--momentum_teacher" in printed and "(default: 0.996)" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_path", "/no/such/folder"], "--data_path /no/such/folder"),
        (["--patch_size", "32"], "--global_crop_size 16 is less than --patch_size 32"),
        (["--local_crop_size", "4"], "--local_crop_size 4 is less than --patch_size 8"),
        (["--epochs", "0"], "--epochs 0 is less than 1"),
        (["--eval_knn_freq", "1", "--val_path", "/no/such/folder"], "--val_path /no/such/folder"),
        (["--batch_size_per_gpu", "5000"], "1438 images on 1 process"),
        (["--arch", "vit_smal"], "vit_small"),
        (["--device", "cuda"], "--device cuda"),
    ],
)
def test_bad_input_is_one_clear_message_and_no_traceback(tmp_path, flags, message, capsys, monkeypatch):
    if flags[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.undo()  # the networks that the flags name
    monkeypatch.setattr(sys, "argv", ["main_dino.py", *TINY, "--output_dir", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as end:
        main_dino.main()
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


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
    train(tmp_path / "whole", *flags)

    train(tmp_path / "official", *flags, "--saveckp_freq", 1)
    (tmp_path / "resumed").mkdir()
    state = load_latest(tmp_path / "official" / "checkpoint0000.pth")
    torch.save(as_the_official_code_saves(state), tmp_path / "resumed" / "checkpoint.pth")
    train(tmp_path / "resumed", *flags, "--arch", "deit_tiny")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")[3:]
    assert_same_state(state_of(tmp_path / "resumed"), state_of(tmp_path / "whole"))

    del state["student"]["module.backbone.cls_token"]
    (tmp_path / "other").mkdir()
    torch.save(as_the_official_code_saves(state), tmp_path / "other" / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"the checkpoint's student does not fit this run: .*backbone\.cls_token"):
        train(tmp_path / "other", *flags)


def test_unreadable_images_stop_neither_the_training_nor_its_knn_and_pictures(images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    val = shutil.copytree(images, tmp_path / "val")
    for broken in (folder / "class0" / "0.png", val / "class1" / "22.png"):
        broken.write_bytes(broken.read_bytes()[:100])
    flags = ("--data_path", folder, "--val_path", val, "--eval_knn_freq", 1, "--pictures", "on")
    written = train(tmp_path / "run", *flags)
    assert sum("knn_top1" in line for line in written) == 2
    listed = [(tmp_path / "run" / f"bad_images{part}.txt").read_text().split("\t")[0] for part in ("", "_val")]
    assert listed == [str(folder / "class0" / "0.png"), str(val / "class1" / "22.png")]
    with pytest.raises(ImageError, match=str(folder / "class0" / "0.png")):
        train(tmp_path / "strict", *flags, "--on_bad_image", "error")


def test_too_few_images_for_a_val_part_are_trained_on_unless_knn_was_asked_for(tmp_path, capsys):
    for c in "ab":  # names of which none falls into the val part
        names = [name for name in map("{}.png".format, range(20)) if zlib.crc32(f"{c}/{name}".encode()) % 10]
        for i, name in enumerate(names[:4]):
            write_image(tmp_path / "images" / c / name, picture(i))
    flags = [*TINY, "--data_path", str(tmp_path / "images"), "--output_dir", str(tmp_path / "run")]
    args = parse_args(flags)
    args.eval_knn_freq, args.pictures = None, True
    train_dino(args)
    printed = capsys.readouterr().out
    drawn = {path.name for path in (tmp_path / "run" / "pictures").iterdir()}
    assert drawn == {"views.png", "neighbours.png", "curves.png", "attention"}
    assert "no k-NN evaluation: --data_path" in printed and "too few images, none of them falls into" in printed
    assert "views are enlarged" not in printed
    with pytest.raises(ValueError, match=r"--eval_knn_freq 1: .* too few images"):
        train_dino(parse_args([*flags, "--eval_knn_freq", "1"]))


def test_views_larger_than_the_images_and_pixels_that_fill_no_patch_are_stated(images, tmp_path, capsys):
    train(tmp_path, "--data_path", images, "--global_crop_size", 24, "--local_crop_size", 11)
    printed = capsys.readouterr().out
    assert "images of 20 pixels are smaller than --global_crop_size 24: views are enlarged" in printed
    assert "--patch_size 8 does not divide --local_crop_size 11; the last 3 rows and columns" in printed


def test_another_architecture_than_the_checkpoints_is_refused_and_leaves_it_alone(images, tmp_path):
    train(tmp_path, "--data_path", images)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(ValueError, match=r"--patch_size 4 does not fit .*--patch_size 8"):
        train(tmp_path, "--data_path", images, "--patch_size", 4)
    with pytest.raises(ValueError, match=r"--global_crop_size 24 does not fit .*--global_crop_size 16"):
        train(tmp_path, "--data_path", images, "--global_crop_size", 24)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_a_checkpoint_that_fits_in_part_is_refused(images, tmp_path):
    train(tmp_path, "--data_path", images)
    path = tmp_path / "checkpoint.pth"
    checkpoint = load_latest(path)
    del checkpoint["student"]["module.backbone.pos_embed"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"student does not fit this run: .*Missing key.*backbone\.pos_embed"):
        train(tmp_path, "--data_path", images, "--epochs", 2)


def test_a_changed_batch_continues_with_a_statement_or_is_refused(images, tmp_path, capsys):
    train(tmp_path, "--data_path", images)
    with pytest.raises(ValueError, match="on_changed_run refuse: 8 images per step"):
        train(tmp_path, "--data_path", images, "--batch_size_per_gpu", 4, "--epochs", 2, "--on_changed_run", "refuse")
    train(tmp_path, "--data_path", images, "--batch_size_per_gpu", 4, "--epochs", 2)
    assert "8 images per step on 1 processes before, 4 on 1 now" in capsys.readouterr().out
    assert len(losses(tmp_path)) == 3 + 6
