"""PAWS through its real program: configurations, files, resuming, several processes, a user's own pictures."""

import csv
import math
import sys

import numpy as np
import pytest
import torch
import yaml

from paws import main as programs
from paws import main_distributed, suncet_train
from tests.command_lines import error_of
from tests.paws.tiny import ROOT, SUNCET, TINY, train, write_own_pictures
from tests.run_folders import lines, state_of

CONFIGS = ROOT / "paws/configs"
FEW = ("--labels_per_class", 2)


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


def test_an_official_configuration_is_read_as_it_stands(tmp_path):
    """All keys of the released file, with its device and its folders."""
    tree = yaml.safe_load((CONFIGS / "paws/imgnt_train.yaml").read_text())
    tree["data"] |= {"root_path": "/datasets/", "image_folder": "imagenet/"}
    tree["logging"] |= {"folder": "checkpoints/"}
    tree["meta"] |= {"copy_data": True, "device": "cuda:0", "load_checkpoint": False, "read_checkpoint": None}
    (tmp_path / "official.yaml").write_text(yaml.safe_dump(tree))
    args = programs.parse_args(["--fname", str(tmp_path / "official.yaml")])
    assert (args.data_path, args.device, args.output_dir) == ("/datasets/imagenet", "cuda", "checkpoints/")


# --- A training -------------------------------------------------------------------------------------------------------


def test_training_writes_the_official_files(whole):
    written = [line for line in lines(whole) if "loss" in line]
    assert [line["step"] for line in written] == [1, 2, 3, 4, 5, 6]
    for line in written:
        assert line["loss"] == pytest.approx(line["ploss"] + line["me_max"], abs=1e-5)
        assert line["mean_entropy"] <= line["ln_k"] + 1e-4 and line["ln_k"] == pytest.approx(math.log(3))
        assert line["skipped"] == 0
    assert [line["step"] for line in lines(whole) if "snn_top1" in line] == [0, 3, 6]
    (pixels,) = [line["pixels_snn_top1"] for line in lines(whole) if "pixels_snn_top1" in line]
    assert 0 <= pixels <= 100
    state = state_of(whole)
    official = "encoder opt epoch unlabel_prob s_batch_size u_batch_size world_size lr temperature amp".split()
    assert state.keys() >= set(official) and state["epoch"] == 2
    assert set(state["opt"]["state"][0]) == {"momentum_buffer"}


def test_every_unlabelled_image_gets_a_label_and_a_confidence(whole, images):
    with open(whole / "pseudo_labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 - 6 and {row["label"] for row in rows} <= {"class0", "class1", "class2"}
    for row in rows:
        assert (images / row["image"]).is_file() and row["image"].startswith(row["class"])
        assert 1 / 3 <= float(row["confidence"]) <= 1


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
    flags = ("--read_checkpoint", "official-ep2.pth.tar", "--momentum", 0.5)
    train(tmp_path, "--data_path", images, *FEW, "--epochs", 3, *flags)
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [7, 8, 9]
    assert {group["momentum"] for group in state_of(tmp_path)["opt"]["param_groups"]} == {0.5}  # as the flags say
    with pytest.raises(OSError, match=r"--read_checkpoint nowhere\.pth\.tar: there is no such file"):
        train(tmp_path / "new", "--data_path", images, *FEW, "--read_checkpoint", "nowhere.pth.tar")


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
    command = [*TINY, "--data_path", str(pictures), "--labels", str(labels), "--output_dir", str(tmp_path / "run")]
    command += ["--epochs", "3", "--pictures", "on", "--max_bad_fraction", "0.1"]
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
    assert "32 labels of 2 classes" in printed and "no pseudo-labels: none of the 1 images" in printed
    confidences = [float(row["confidence"]) for row in rows]
    least = sorted(confidences)[10]  # several may have it
    train(tmp_path / "certain", "--data_path", pictures, *tables, "--min_confidence", least)
    certain = sum(confidence >= least for confidence in confidences)
    assert f"{12 + certain} labels of 2 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels_per_class", "1"], "class 'class0' has 1 labelled image(s); --supervised_imgs_per_class 2"),
        (["--classes_per_batch", "2"], "--classes_per_batch 2 does not divide the 3 classes"),
        (["--unsupervised_batch_size", "500"], "24 images on 1 process"),
        (["--temperature", "0"], "--temperature 0.0: expected a positive number"),
        (["--saveckp_minutes", "-1"], "--saveckp_minutes -1.0: expected at least 0"),
        (["--label_smoothing", "1"], "--label_smoothing 1.0"),
        (["--warmup", "2"], "--warmup 2"),
        (["--output_dim", "3"], "--output_dim 3 is less than 4"),
        (["--val_path", "nowhere", "--eval_knn_freq", "1"], "--val_path nowhere"),
        (["--devices", "cuda:0", "cuda:1"], "torchrun --nproc_per_node=2 main.py"),
        (["--devices", "cuda:1"], "set CUDA_VISIBLE_DEVICES=1"),
        (["--devices", "gpu"], "--devices gpu: expected cuda:0 or cpu"),
        (["--color_jitter_strength", "3"], "--color_jitter_strength 3.0 is outside"),
        (["--multicrop", "-1"], "--multicrop -1"),
        (["--supervised_views", "0"], "--supervised_views 0"),
    ],
)
def test_bad_input_is_one_clear_message(images, tmp_path, flags, message):
    given = (*TINY, *FEW, "--data_path", images, "--output_dir", tmp_path)
    assert message in error_of(programs.main, *given, *flags)


def test_a_labelled_image_that_cannot_be_read_is_named(tmp_path):
    pictures, labels = write_own_pictures(tmp_path)
    (pictures / "3.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"3\.png"):
        train(tmp_path / "run", "--data_path", pictures, "--labels", labels, "--supervised_imgs_per_class", 6)


# --- SuNCEt -----------------------------------------------------------------------------------------------------------


def test_suncet_stops_its_supervised_loss(images, tmp_path):
    flags = [*SUNCET, *FEW, "--data_path", images, "--output_dir", tmp_path, "--supervised_epochs", 1, "--epochs", 2]
    suncet_train.train_suncet(suncet_train.parse_args([str(flag) for flag in flags]))
    written = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["suncet"] > 0 for line in written] == [True] * 3 + [False] * 3
    for line in written:
        assert line["loss"] == pytest.approx(line["simclr"] + line["suncet"], rel=1e-5)


# --- Jobs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["paws_train", "suncet_train", "fine_tune", "snn_fine_tune"])
def test_every_flag_is_accepted_with_its_default(submitted, program):
    flags = ["--sel", program, "--data_path", "images"]
    flags += ["--pretrained", "x"] if "fine_tune" in program else []
    main_distributed.main([*flags, "--nodes", "4"])
    train, args = submitted[0]
    assert train is programs.program_function(program) and train.__module__ == f"paws.{program}"
    assert vars(programs.parse_args(flags)).items() <= vars(args).items()
    assert (args.nodes, args.job_name) == (4, program)
    assert not hasattr(args, "sel") and not hasattr(args, "batch_launch")


def test_a_list_of_configurations_becomes_as_many_jobs(submitted, tmp_path):
    files = [str(ROOT / "paws/configs/paws" / name) for name in ("imgnt_train.yaml", "cifar10_train.yaml")]
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(files))
    main_distributed.main(["--fname", str(tmp_path / "list.yaml"), "--batch-launch", "--data_path", "x"])
    assert [(args.epochs, args.data_path) for _, args in submitted] == [(100, "x"), (600, "x")]
    (tmp_path / "list.yaml").write_text("epochs: 3\n")
    with pytest.raises(SystemExit) as end:
        main_distributed.main(["--fname", str(tmp_path / "list.yaml"), "--batch-launch"])
    assert end.value.code == 2


def test_the_official_command_line_is_understood(submitted):
    words = "--sel paws_train --fname FILE --folder logs --partition gpu --nodes 8 --tasks-per-node 8 --time 1000"
    file = str(ROOT / "paws/configs/paws/imgnt_train.yaml")
    main_distributed.main([*words.replace("FILE", file).split(), "--data_path", "x", "--output_dir", "run"])
    ((_, args),) = submitted
    found = (args.job_dir, args.output_dir, args.partition, args.nodes, args.ngpus, args.timeout)
    assert found == ("logs", "run", "gpu", 8, 8, 1000)
