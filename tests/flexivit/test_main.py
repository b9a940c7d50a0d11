"""The training of FlexiViT, its evaluation and its distillation."""

import math

import pytest
import torch
import torch.nn.functional as F

from flexivit import eval_flexivit
from flexivit.checkpoints import load_flexible
from flexivit.flexible_vit import AtPatchSize
from flexivit.main import draw_grid, mix, parse_args
from tests.flexivit.tiny import train
from tests.run_folders import state_of, stopped_after

FEW = ("--data_path", "digits", "--batch_size", "360")


def test_every_grid_is_trained_and_the_largest_one_is_the_accuracy(tmp_path):
    found = train(tmp_path, *FEW, "--loss", "softmax", "--lr", "0.01", "--epochs", "4")
    last = found[-1]
    assert last["test_acc1"] == last["test_acc1_grid4"] > 15 and {"test_acc1_grid2", "test_acc1_grid3"} <= set(last)
    steps = [line for line in found if "loss" in line]
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["lr"] < 0.01
    drawn = {draw_grid(step, (2, 3, 4), None, (0, 0)) for step in range(len(steps))}
    assert drawn == {2, 3, 4}


def test_an_interrupted_run_goes_on_as_it_would_have(tmp_path):
    train(tmp_path / "whole", *FEW)
    with stopped_after(5):
        train(tmp_path / "parts", *FEW)
    train(tmp_path / "parts", *FEW, "--num_workers", "1")
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert all(torch.equal(tensor, parts["model"][name]) for name, tensor in whole["model"].items())


def test_a_resumed_run_takes_the_options_of_its_flags(tmp_path):
    with stopped_after(2):
        train(tmp_path, *FEW, "--lr", "0.01", "--weight_decay", "0.001")
    train(tmp_path, *FEW, "--lr", "0.02", "--weight_decay", "0.5", "--on_changed_run", "continue")
    decays = {group["weight_decay"] for group in state_of(tmp_path)["optimizer"]["param_groups"]}
    assert decays == {0.0, 25.0}  # 0.5 / 0.02


def test_compiled_blocks_give_the_same_at_every_grid(tmp_path, monkeypatch):
    compiled, compile_function = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append(how) or compile_function(f, backend="eager"))
    plain, fast = (train(tmp_path / str(flags), *FEW, *flags)[-1] for flags in ((), ("--compile",)))
    assert compiled == [{"dynamic": True}] * 2 and fast["test_acc1"] == plain["test_acc1"]


def test_weights_are_drawn_as_often_as_asked():
    drawn = [draw_grid(step, (2, 3, 4), (0, 1, 3)) for step in range(2000)]
    assert 2 not in drawn and abs(drawn.count(4) / 2000 - 0.75) < 0.03


def test_weights_stay_with_their_grids_in_whatever_order_they_are_given():
    args = parse_args("--data_path digits --grids 8 2 4 --grid_weights 1 0 0 --test_grids 4 2".split())
    assert {draw_grid(step, args.grids, args.grid_weights) for step in range(20)} == {8}
    assert args.test_grids == [2, 4]
    assert parse_args("--data_path digits --grids 8 2 4 5".split()).test_grids == [2, 5, 8]


def test_mixup_mixes_images_and_labels_alike():
    torch.manual_seed(0)
    images, targets = torch.randn(6, 3, 4, 4), F.one_hot(torch.arange(6)).float()
    mixed, labels = mix(images, targets, 0.5)
    shares = labels.diagonal()
    assert (shares == shares[0]).all() and 0.5 <= shares[0] < 1
    torch.testing.assert_close(labels, shares[0] * targets + (1 - shares[0]) * targets.roll(1, 0))
    torch.testing.assert_close(mixed, shares[0] * images + (1 - shares[0]) * images.roll(1, 0))
    assert mix(images, targets, 0.0) == (images, targets)


def test_a_student_learns_from_a_teacher_of_another_image_size(tmp_path, capsys):
    train(tmp_path / "teacher", *FEW, "--input_size", "24", "--loss", "softmax", "--lr", "0.003")
    teacher = str(tmp_path / "teacher" / "checkpoint.pth")
    flags = ("--teacher", teacher, "--teacher_input_size", "24", "--lr", "0.0003", "--mixup", "0")
    found = train(tmp_path / "student", *FEW, *flags, "--patch_size", "8")
    start = next(line for line in found if "loss" in line)
    printed = capsys.readouterr().out
    assert "% with random weights" in printed and "% with the weights of --teacher" in printed  # teacher and student
    assert start["loss"] < 0.5 and math.isfinite(found[-1]["test_loss"])  # it starts from the teacher's weights
    random = train(tmp_path / "random", *FEW, *flags, "--init", "random")
    assert next(line for line in random if "loss" in line)["loss"] > 2 * start["loss"]
    with pytest.raises(
        ValueError, match="data set has other classes than those that --teacher was trained on: 12 against 10"
    ):
        train(tmp_path / "other", "--data_path", "materials", "--teacher", teacher)


def test_the_evaluation_prints_a_row_per_patch_size(tmp_path, capsys):
    last = train(tmp_path, *FEW, "--loss", "softmax", "--lr", "0.01", "--epochs", "3", "--amp", "fp32")[-1]
    flags = ["--pretrained", str(tmp_path / "checkpoint.pth"), "--data_path", "digits", "--device", "cpu"]
    flags += ["--num_workers", "0", "--output_dir", str(tmp_path / "cost")]
    rows = eval_flexivit.eval_flexivit(eval_flexivit.parse_args(flags))
    assert [row["patch_size"] for row in rows] == [4, 5, 8] and [row["tokens"] for row in rows] == [16, 9, 4]
    expected = [last[f"test_acc1_grid{grid}"] for grid in (4, 3, 2)]  # of the training's own evaluation
    assert [row["acc1"] for row in rows] == pytest.approx(expected) and len(set(expected)) == 3
    assert rows[0]["gflops"] > rows[1]["gflops"] > rows[2]["gflops"] > 0
    assert (tmp_path / "cost" / "cost.csv").read_text().startswith("patch_size,tokens,gflops,images_per_s,acc1\n4,16,")
    assert (
        tmp_path / "cost" / "cost.png"
    ).exists() and "--image_size 16, as in the training" in capsys.readouterr().out
    with pytest.raises(ValueError, match="cannot have patches of 17x17"):
        eval_flexivit.eval_flexivit(eval_flexivit.parse_args([*flags, "--sizes", "17"]))
    with pytest.raises(ValueError, match="other classes than those that the classifier was trained on: 12 against 10"):
        eval_flexivit.eval_flexivit(eval_flexivit.parse_args([*flags[:2], *flags[4:], "--data_path", "materials"]))


def test_operations_are_counted_as_the_formula_says(tmp_path):
    """Two per multiplication: patches, 12 N D^2 and 2 N^2 D of each block, with N tokens of D channels."""
    train(tmp_path, *FEW, "--epochs", "1")
    network = load_flexible(tmp_path / "checkpoint.pth")
    n, d = 4 * 4 + 1, 32
    expected = 2 * (16 * d * 3 * 16 + 2 * (12 * n * d * d + 2 * n * n * d) + 10 * d)
    assert 1e9 * eval_flexivit.giga_operations(network, 16, 4) == pytest.approx(expected)
    assert AtPatchSize(network, 4)(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grids", "2", "17", "--input_size", "16"], "--grids 2 17: an image of 16 pixels has no such grid"),
        (["--grids", "2", "3", "--grid_weights", "1"], "--grid_weights: expected a weight for each of the 2"),
        (["--grids", "2", "3", "--grid_weights", "0", "0"], "not all of them 0"),
        (["--lr", "0"], "--lr 0.0 is not positive"),
        (["--clip_grad", "-1"], "--clip_grad -1.0 is not positive"),
        (["--test_freq", "0"], "--test_freq 0 is less than 1"),
        (["--mixup", "-1"], "--mixup -1.0 is less than 0"),
        (["--crop_scale", "1", "0.5"], "--crop_scale 1.0 0.5: expected a range of areas"),
    ],
)
def test_flags_that_make_no_sense_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--data_path", "digits", *flags])
    assert message in capsys.readouterr().err
