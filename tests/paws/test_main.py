"""PAWS through its real program: configurations, files, resuming, several processes, a user's own pictures."""

import contextlib
import csv
import math
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml

from paws import main as programs
from paws import paws_train, suncet_train
from paws.report import collapse_monitor
from shared.run.run import Run
from tests.paws.tiny import (
    ROOT,
    SUNCET,
    TINY,
    Stop,
    comparable,
    lines,
    losses,
    state_of,
    stop_after,
    train,
    train_on_rank,
    write_noise,
    write_own_pictures,
)
from tests.processes import run_processes
from tests.reliability.runs import assert_same

CONFIGS = ROOT / "paws/configs"
FEW = ("--labels_per_class", 2)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("images") / "noise")


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """Output folder of a run of two epochs of three steps that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder, "--data_path", images, *FEW, "--epochs", 2, "--saveckp_steps", 1, "--eval_knn_freq", 1)
    return folder


# --- Configurations ---------------------------------------------------------------------------------------------------

PROGRAM_OF = {
    "paws/imgnt_train.yaml": "paws_train",
    "paws/cifar10_train.yaml": "paws_train",
    "paws/own_images.yaml": "paws_train",
    "paws/cifar10_snn.yaml": "snn_fine_tune",
    "paws/imgnt_fine_tune.yaml": "fine_tune",
    "suncet/imgnt_train.yaml": "suncet_train",
}


def test_every_configuration_belongs_to_a_program():
    assert {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")} == set(PROGRAM_OF)


@pytest.mark.parametrize("file", PROGRAM_OF)
def test_configurations_are_read_and_the_command_line_wins(file):
    flags = ["--sel", PROGRAM_OF[file], "--fname", str(CONFIGS / file), "--data_path", "images", "--devices", "cuda:0"]
    args = programs.parse_args([*flags, "--epochs", "77"])
    assert (args.epochs, args.data_path, args.device) == (77, "images", "cuda")
    for section in yaml.safe_load((CONFIGS / file).read_text()).values():
        for key, value in section.items():
            if key not in ("epochs", "data_path"):
                assert getattr(args, key) == value, key


def test_published_values():
    paws, cifar, suncet = (
        programs.parse_args(["--sel", PROGRAM_OF[file], "--fname", str(CONFIGS / file), "--data_path", "x"])
        for file in ("paws/imgnt_train.yaml", "paws/cifar10_train.yaml", "suncet/imgnt_train.yaml")
    )
    names = ("classes_per_batch", "supervised_imgs_per_class", "supervised_views", "unsupervised_batch_size", "lr",
             "start_lr", "final_lr", "warmup", "epochs", "label_smoothing", "temperature", "output_dim",
             "use_pred_head", "unique_classes_per_rank")  # fmt: skip
    assert [getattr(paws, name) for name in names] == [
        15, 7, 1, 64, 6.4, 0.3, 0.064, 10, 100, 0.1, 0.1, 2048, True, True,
    ]  # fmt: skip
    assert [getattr(cifar, name) for name in names] == [
        10, 64, 2, 256, 3.2, 0.8, 0.032, 10, 600, 0.1, 0.1, 128, False, False,
    ]  # fmt: skip
    assert [getattr(suncet, name) for name in names] == [
        20, 2, 1, 44, 4.8, 0.6, 0.048, 10, 100, 0.0, 0.1, 2048, False, False,
    ]  # fmt: skip


def test_an_official_configuration_is_read_as_it_stands(tmp_path):
    """All keys of the released file, with its device and its folders."""
    tree = yaml.safe_load((CONFIGS / "paws/imgnt_train.yaml").read_text())
    tree["data"] |= {"root_path": "/datasets/", "image_folder": "imagenet/"}
    tree["logging"] |= {"folder": "checkpoints/"}
    tree["meta"] |= {"copy_data": True, "device": "cuda:0", "load_checkpoint": False, "read_checkpoint": None}
    (tmp_path / "official.yaml").write_text(yaml.safe_dump(tree))
    args = programs.parse_args(["--fname", str(tmp_path / "official.yaml")])
    assert (args.data_path, args.device, args.output_dir) == ("/datasets/imagenet", "cuda", "checkpoints/")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimization:\n  lr: fast\n", "optimization.lr: expected a number, got the text 'fast'"),
        ("criterion:\n  me_max: 1\n", "criterion.me_max: expected true or false"),
        ("criterion:\n  sharpn: 0.25\n", "criterion.sharpn: no such key; is sharpen meant?"),
        ("- 1\n", "expected keys with values, got a list"),
    ],
)
def test_configurations_with_mistakes_end_the_program(tmp_path, text, message, capsys):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        programs.parse_args(["--fname", str(tmp_path / "wrong.yaml")])
    assert end.value.code == 2 and message in capsys.readouterr().err


# --- A training -------------------------------------------------------------------------------------------------------


def test_training_writes_the_official_files(whole):
    written = [line for line in lines(whole) if "loss" in line]
    assert [line["step"] for line in written] == [1, 2, 3, 4, 5, 6]
    for line in written:
        assert line["loss"] == pytest.approx(line["ploss"] + line["me_max"], abs=1e-5)
        assert line["mean_entropy"] <= line["ln_k"] + 1e-4 and line["ln_k"] == pytest.approx(math.log(3))
        assert line["skipped"] == 0
    assert [line["step"] for line in lines(whole) if "snn_top1" in line] == [0, 3, 6]
    state = state_of(whole)
    official = {"encoder", "opt", "epoch", "unlabel_prob", "s_batch_size", "u_batch_size", "world_size", "lr",
                "temperature", "amp"}  # fmt: skip
    assert official <= state.keys() and state["epoch"] == 2
    assert set(state["opt"]["state"][0]) == {"momentum_buffer"}


def test_every_unlabelled_image_gets_a_label_and_a_confidence(whole, images):
    with open(whole / "pseudo_labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 - 6 and {row["label"] for row in rows} <= {"class0", "class1", "class2"}
    for row in rows:
        assert (images / row["image"]).is_file() and row["image"].startswith(row["class"])
        assert 1 / 3 <= float(row["confidence"]) <= 1


def train_on_rank_and_stop(rank: int, steps: int, *flags) -> None:
    Run.update = stop_after(steps)
    with contextlib.suppress(Stop):
        train_on_rank(rank, *flags)


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_a_run_stopped_anywhere_ends_like_an_uninterrupted_one(images, whole, tmp_path, monkeypatch, steps):
    flags = ("--data_path", images, *FEW, "--epochs", 2, "--saveckp_steps", 1, "--eval_knn_freq", 1)
    monkeypatch.setattr(Run, "update", stop_after(steps))
    with pytest.raises(Stop):
        train(tmp_path, *flags)
    monkeypatch.undo()
    train(tmp_path, *flags)
    assert losses(tmp_path) == losses(whole)
    assert_same(*(comparable(state_of(folder)) for folder in (tmp_path, whole)), "checkpoint")
    for name in ("log.txt", "pseudo_labels.csv"):
        assert (tmp_path / name).read_text() == (whole / name).read_text()


def test_a_run_stopped_between_two_epochs_ends_like_an_uninterrupted_one(images, whole, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise Stop

    flags = ("--data_path", images, *FEW, "--epochs", 2, "--saveckp_steps", 1, "--eval_knn_freq", 1)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Run, "end_epoch", stop)
        train(tmp_path, *flags)
    with monkeypatch.context() as patch, pytest.raises(Stop):  # no step before this save
        patch.setattr(Run, "update", stop)
        train(tmp_path, *flags)
    uninterrupted = tmp_path / "uninterrupted"
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Run, "update", stop_after(3))
        train(uninterrupted, *flags)
    assert_same(*(comparable(state_of(folder)) for folder in (tmp_path, uninterrupted)), "checkpoint")


def test_other_labels_are_said_or_refused(images, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    flags = ("--data_path", images, *FEW, "--epochs", 2, "--data_seed", 1)
    with pytest.raises(ValueError, match="--on_changed_run refuse: other training images"):
        train(tmp_path / "run", *flags, "--on_changed_run", "refuse")
    with pytest.raises(ValueError, match=r"--output_dim 8 does not fit .*--output_dim 16"):
        train(tmp_path / "run", *flags, "--output_dim", 8)


@pytest.mark.parametrize("unique", ["false", "true"])
def test_two_processes_train_and_their_run_resumes(images, tmp_path, unique):
    flags = ["--data_path", images, "--labels_per_class", 4, "--unsupervised_batch_size", 4, "--epochs", 2]
    flags += ["--supervised_views", 2, "--unique_classes_per_rank", unique, "--saveckp_steps", 1]
    if unique == "true":
        flags += ["--classes_per_batch", 1]
    run_processes(train_on_rank, 2, tmp_path / "whole", *flags)
    run_processes(train_on_rank_and_stop, 2, 4, tmp_path / "parts", *flags)  # in the second epoch
    assert state_of(tmp_path / "parts")["step_in_epoch"] == 1
    run_processes(train_on_rank, 2, tmp_path / "parts", *flags)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 6 and all(math.isfinite(loss) for loss in losses(tmp_path / "whole"))
    assert_same(*(comparable(state_of(tmp_path / name)) for name in ("parts", "whole")), "checkpoint")


def test_an_official_checkpoint_is_resumed(images, whole, tmp_path):
    """Names with ``module.``, no state of ours, and numpy numbers."""
    state = state_of(whole)
    groups = [{**group, "lr": np.float64(group["lr"])} for group in state["opt"]["param_groups"]]
    torch.save(
        {
            "encoder": {f"module.{name}": value for name, value in state["encoder"].items()},
            "opt": {"state": state["opt"]["state"], "param_groups": groups},
            "epoch": 2,
            "unlabel_prob": 0.9,
            "loss": 1.2,
            "world_size": 1,
            "amp": None,
        },
        tmp_path / "official-ep2.pth.tar",
    )
    train(tmp_path, "--data_path", images, *FEW, "--epochs", 3, "--read_checkpoint", "official-ep2.pth.tar")
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [7, 8, 9]
    with pytest.raises(OSError, match=r"--read_checkpoint nowhere\.pth\.tar: there is no such file"):
        train(tmp_path / "new", "--data_path", images, *FEW, "--read_checkpoint", "nowhere.pth.tar")


def test_a_step_that_is_not_finite_is_left_out(images, tmp_path, monkeypatch):
    normalize_views, calls = paws_train.normalize_views, []

    def spoilt(*args):
        views = normalize_views(*args)
        calls.append(views)
        if len(calls) == 3:  # supports of the second step
            views[0][0, 0, 0, 0] = math.nan
        return views

    monkeypatch.setattr(paws_train, "normalize_views", spoilt)
    written = train(tmp_path, "--data_path", images, *FEW)
    assert [line["skipped"] for line in written] == [0, 1, 0]
    assert all(value.isfinite().all() for value in state_of(tmp_path)["encoder"].values())


@pytest.mark.parametrize(
    "flags",
    [
        ["--multicrop", "0", "--me_max", "false", "--use_pred_head", "false", "--nesterov", "true"],
        ["--small_image_size", "12", "--in_chans", "1", "--augmentation", "pil", "--cache", "memory"],
        ["--dataset", "cifar10", "--classes_per_batch", "1", "--normalize", "false", "--write_tag", "paws"],
    ],
)
def test_other_flags_train_too(images, tmp_path, flags):
    written = train(tmp_path, "--data_path", images, *FEW, *flags)
    assert len(written) == 3 and all(math.isfinite(line["loss"]) for line in written)


# --- A user's own pictures --------------------------------------------------------------------------------------------


def test_a_person_with_few_labels_gets_pseudo_labels_with_one_command(tmp_path, capsys, monkeypatch):
    pictures, labels = write_own_pictures(tmp_path)
    (pictures / "broken.png").write_bytes((pictures / "20.png").read_bytes()[:60])
    command = [*TINY, "--data_path", str(pictures), "--labels", str(labels), "--epochs", "3", "--pictures", "on",
               "--max_bad_fraction", "0.1", "--output_dir", str(tmp_path / "run")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["main.py", *command])
    programs.main()
    with open(tmp_path / "run/pseudo_labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "label", "confidence"] and len(rows) == 20
    right = [("dark", "bright")[int(row["image"].rpartition("/")[2][:-4]) % 2] == row["label"] for row in rows]
    assert sum(right) > 15  # dark and bright pictures are easily told apart
    assert "broken.png\t" in (tmp_path / "run/unreadable.txt").read_text()
    for name in ("certainty", "views", "curves"):
        assert (tmp_path / f"run/pictures/{name}.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "12 labels of 2 classes (6 to 6 of each)" in printed
    assert "20 pseudo-labels" in printed and "accuracy not known" in printed

    # self-training: the pseudo-labels are labels of the next run
    tables = ["--labels", str(labels), str(tmp_path / "run/pseudo_labels.csv"), "--max_bad_fraction", "0.1"]
    train(tmp_path / "all", "--data_path", pictures, *tables)
    printed = capsys.readouterr().out
    assert "32 labels of 2 classes" in printed and "no pseudo-labels: none of the 1 unlabelled images" in printed
    certain = sorted(float(row["confidence"]) for row in rows)[10:]
    train(tmp_path / "certain", "--data_path", pictures, *tables, "--min_confidence", certain[0])
    assert f"{12 + len(certain)} labels of 2 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels_per_class", "1"], "class 'class0' has 1 labelled image(s); --supervised_imgs_per_class 2"),
        (
            ["--labels_per_class", "2", "--classes_per_batch", "2"],
            "--classes_per_batch 2 does not divide the 3 classes",
        ),
        (["--labels_per_class", "2", "--unsupervised_batch_size", "500"], "24 images on 1 process"),
        (["--labels_per_class", "2", "--model_name", "resnt50"], "resnet50"),
        (["--labels_per_class", "2", "--temperature", "0"], "--temperature 0.0: expected a positive number"),
        (["--labels_per_class", "2", "--label_smoothing", "1"], "--label_smoothing 1.0"),
        (["--labels_per_class", "2", "--warmup", "2"], "--warmup 2"),
        (["--labels_per_class", "2", "--pretrained", "nowhere.pth"], "--pretrained nowhere.pth is neither a file"),
        (["--labels_per_class", "2", "--val_path", "nowhere", "--eval_knn_freq", "1"], "--val_path nowhere"),
        (["--sel", "paws_trian"], "paws_trian"),
        (["--labels_per_class", "2", "--devices", "cuda:0", "cuda:1"], "torchrun --nproc_per_node=2 main.py"),
        (["--labels_per_class", "2", "--devices", "cuda:1"], "set CUDA_VISIBLE_DEVICES=1"),
        (["--labels_per_class", "2", "--devices", "gpu"], "--devices gpu: expected cuda:0 or cpu"),
        (["--labels_per_class", "2", "--color_jitter_strength", "3"], "--color_jitter_strength 3.0 is outside"),
    ],
)
def test_bad_input_is_one_clear_message(images, tmp_path, flags, message, monkeypatch, capsys):
    arguments = [*TINY, "--data_path", str(images), "--output_dir", str(tmp_path), *flags]
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    with pytest.raises(SystemExit) as end:
        programs.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_labelled_image_that_cannot_be_read_is_named(tmp_path):
    pictures, labels = write_own_pictures(tmp_path)
    (pictures / "3.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"3\.png"):
        train(tmp_path / "run", "--data_path", pictures, "--labels", labels, "--supervised_imgs_per_class", 6)


def test_collapses_are_told_with_a_flag_to_try():
    monitor = collapse_monitor(10, total_steps=20)
    ln_k = math.log(10)
    good = {"step": 10, "feature_spread": 0.5, "mean_entropy": math.log(9), "ln_k": ln_k, "certainty": 0.8}
    assert monitor.check(good) is None
    assert monitor.check(good | {"step": 2, "feature_spread": 0.0}) is None  # too early
    few = monitor.check(good | {"mean_entropy": math.log(2)})
    assert "COLLAPSE" in few and "few of the 10 classes (entropy of their mean 0.69, of all classes 2.30)" in few
    assert "--sharpen" in monitor.check(good | {"certainty": 0.11})
    assert "same representation" in monitor.check(good | {"feature_spread": 0.01})
    assert len(monitor.warnings) == 3


# --- SuNCEt -----------------------------------------------------------------------------------------------------------


def train_suncet(output_dir, *flags) -> list[dict]:
    arguments = [*SUNCET, "--output_dir", str(output_dir), *map(str, flags)]
    suncet_train.train_suncet(suncet_train.parse_args(arguments))
    return [line for line in lines(output_dir) if "loss" in line]


def test_suncet_stops_its_supervised_loss_and_resumes(images, tmp_path):
    flags = ("--data_path", images, *FEW, "--supervised_epochs", 1)
    whole = train_suncet(tmp_path / "whole", *flags, "--epochs", 2)
    assert all(line["suncet"] > 0 for line in whole[:3]) and all(line["suncet"] == 0 for line in whole[3:])
    for line in whole:
        assert line["loss"] == pytest.approx(line["simclr"] + line["suncet"], rel=1e-5)
    shutil.copytree(tmp_path / "whole", tmp_path / "more")
    more = train_suncet(tmp_path / "more", *flags, "--epochs", 3)
    assert [line["step"] for line in more] == list(range(1, 10))
