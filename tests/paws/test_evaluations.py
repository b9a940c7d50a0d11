"""The programs that follow a training: classification, both kinds of fine-tuning, pseudo-labels, the demonstration."""

import csv
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch

from paws import evaluation, few_labels, fine_tune, pseudo_labels, snn_eval, snn_fine_tune
from paws.evaluation import Representation
from paws.labels import open_partly_labelled
from shared.images.decode import ImageError
from shared.run.attempt import Interrupted
from shared.supervised.evaluation import evaluate_classifier
from tests.command_lines import error_of
from tests.paws.tiny import TINY, comparable, train, write_own_pictures
from tests.reliability.runs import assert_same, write_images
from tests.run_folders import lines, state_of, stopped_after

SAME = ("--dataset", "digits", "--image_size", "12", "--model_name", "wide_resnet10w1", "--num_workers", "0")
RUN = ("--device", "cpu", "--log_freq", "1")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "noise"
    write_images(folder / "train")
    write_images(folder / "val", 9)
    return folder


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """Folder of a training on ``images``, and its last accuracy."""
    folder = tmp_path_factory.mktemp("run") / "paws"
    written = train(folder, "--data_path", images, "--labels_per_class", 2, "--eval_knn_freq", 1)
    return folder, [line["snn_top1"] for line in written if "snn_top1" in line][-1]


def arguments(images, run, *flags) -> list[str]:
    weights = run[0] / "paws-latest.pth.tar"
    given = ("--data_path", images, "--labels_per_class", 2, "--pretrained", weights, *SAME, *flags)
    return [str(word) for word in given]


# --- Soft nearest neighbours ------------------------------------------------------------------------------------------


def test_classes_are_those_of_the_supports_that_are_alike():
    supports = torch.eye(4)
    probabilities = evaluation.classify(supports.flip(0), supports, torch.tensor([0, 1, 1, 2]), 3)
    assert probabilities.argmax(dim=1).tolist() == [2, 1, 1, 0]
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(4))
    assert evaluation.top_k(probabilities, torch.tensor([2, 1, 1, 1])) == (75.0, 100.0)


def test_the_evaluation_gives_what_the_training_has_logged(images, run):
    top1, top5 = snn_eval.snn_eval(snn_eval.parse_args(arguments(images, run, "--device", "cpu")))
    assert top1 == pytest.approx(run[1]) and top5 == 100


def test_what_is_left_open_is_that_of_the_training(images, run, capsys):
    given = arguments(images, run, "--device", "cpu")
    del given[given.index("--dataset") : given.index("--model_name")]
    assert snn_eval.snn_eval(snn_eval.parse_args(given))[0] == pytest.approx(run[1])
    assert "--image_size 12, as in the training" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--image_size 16 contradicts the checkpoint, .* --image_size 12"):
        snn_eval.snn_eval(snn_eval.parse_args([*given, "--image_size", "16"]))


def test_validation_images_are_those_that_belong_to_the_labels(images):
    labelled = open_partly_labelled(str(images / "train"), labels_per_class=2)
    beside = evaluation.open_validation(labelled, str(images / "train"), None)
    assert len(beside.rows) == 9 and beside.source.name.endswith("val")
    shut = open_partly_labelled(str(images / "val"), labels_per_class=2)  # no val part: those without a label
    rest = evaluation.open_validation(shut, str(images / "val"), None)
    assert sorted(rest.rows) == sorted(shut.unlabelled) and "without a label in training" in rest.describe()


def test_validation_images_of_other_classes_are_refused(images, tmp_path):
    labelled = open_partly_labelled(str(images / "train"), labels_per_class=2)
    write_images(tmp_path / "other", 9)
    (tmp_path / "other/class0").rename(tmp_path / "other/zebra")
    with pytest.raises(ValueError, match=r"has other classes .*missing class0, additional zebra"):
        evaluation.open_validation(labelled, None, str(tmp_path / "other"))


PROGRAMS = {
    snn_eval: (snn_eval.snn_eval, ()),
    fine_tune: (fine_tune.fine_tune, ("--epochs", "1", "--batch_size", "3")),
    snn_fine_tune: (snn_fine_tune.snn_fine_tune, ("--epochs", "1")),
}


@pytest.mark.parametrize("script", PROGRAMS)
def test_images_of_other_classes_are_scored_over_those_that_both_have(script, images, run, tmp_path, capsys):
    other = write_images(tmp_path / "other", 9)
    (other / "class0").rename(other / "zebra")
    program, flags = PROGRAMS[script]
    given = arguments(images / "train", run, "--device", "cpu", "--val_path", other, *flags)
    given += [] if script is snn_eval else ["--output_dir", str(tmp_path / "out")]
    hint = r"missing class0, additional zebra; --shared_classes_only true scores over the 2 classes that both have"
    with pytest.raises(ValueError, match=hint):
        program(script.parse_args(given))
    program(script.parse_args([*given, "--shared_classes_only", "true"]))
    printed = capsys.readouterr().out
    assert "left out 1 classes only in train: class0" in printed and "left out 1 classes only in val: zebra" in printed
    assert script is snn_fine_tune or "6 images of" in printed


def test_classes_without_images_are_not_predicted():
    validation = evaluation.Validation(None, np.arange(2), absent=[0])
    probabilities = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.1, 0.3]])
    assert validation.top_k(probabilities, torch.tensor([1, 2])) == (100, 100)


@pytest.mark.parametrize("script", PROGRAMS)
def test_unreadable_images_do_not_stop_an_evaluation_unless_they_are_to(script, images, run, tmp_path, capsys):
    folder = shutil.copytree(images, tmp_path / "images")
    broken = sorted((folder / "val").rglob("*.png"))[4]
    broken.write_bytes(b"")
    program, flags = PROGRAMS[script]
    given = arguments(folder, run, "--device", "cpu", *flags)
    given += [] if script is snn_eval else ["--output_dir", str(tmp_path / "out")]
    program(script.parse_args(given))
    if script is snn_eval:
        assert f"1 of 9 images of {folder / 'val'} cannot be read, the first is {broken}" in capsys.readouterr().out
    else:
        assert str(broken) in (tmp_path / "out/bad_images_val.txt").read_text()
    with pytest.raises(ImageError, match=str(broken)):
        program(script.parse_args([*given, "--on_bad_image", "error"]))


def test_a_labelled_image_that_cannot_be_read_has_no_vote(images, run, tmp_path, capsys):
    folder = shutil.copytree(images, tmp_path / "images")
    labelled = open_partly_labelled(str(folder / "train"), labels_per_class=2)
    broken = labelled.source.path(int(labelled.labelled[3]))
    with open(broken, "wb"):
        pass
    given = arguments(folder, run, "--device", "cpu")
    snn_eval.snn_eval(snn_eval.parse_args(given))
    assert f"the first is {broken}; left out" in capsys.readouterr().out
    with pytest.raises(ImageError, match=broken):
        snn_eval.snn_eval(snn_eval.parse_args([*given, "--on_bad_image", "error"]))


# --- Fine-tuning ------------------------------------------------------------------------------------------------------

FINE_TUNE = (*RUN, "--epochs", "2", "--batch_size", "3", "--lr", "0.1")


def tune(script, folder, *flags):
    """The result of a fine-tuning."""
    program, _ = PROGRAMS[script]
    return program(script.parse_args([*flags, "--output_dir", str(folder)]))


def assert_same_checkpoint(name: str, *folders) -> None:
    assert_same(*(comparable(state_of(folder, f"{name}.pth.tar")) for folder in folders), "checkpoint")


def test_fine_tuning_starts_from_the_projection_head_and_resumes(images, run, tmp_path, capsys):
    parts, whole, name = tmp_path / "parts", tmp_path / "whole", "paws-fine-tune"
    flags = arguments(images, run, *FINE_TUNE, "--saveckp_steps", "1")
    result = tune(fine_tune, whole, *flags)
    printed = capsys.readouterr().out
    assert "7 of 9 entries of the classifier come from the projection head" in printed
    assert f"Top-1 accuracy after the last epoch: {result['acc1']:.2f} %" in printed

    with stopped_after(3):
        tune(fine_tune, parts, *flags)
    assert tune(fine_tune, parts, *flags) == result
    assert_same_checkpoint(name, parts, whole)
    evaluated = ("--training", "false", "--pretrained", str(whole / f"{name}.pth.tar"))
    assert tune(fine_tune, tmp_path / "eval", *flags, *evaluated) == result


def test_a_signal_during_the_validation_saves_and_the_run_goes_on(images, run, tmp_path, monkeypatch):
    parts, whole, name = tmp_path / "parts", tmp_path / "whole", "paws-fine-tune"
    flags = arguments(images, run, *FINE_TUNE, "--eval_knn_freq", "1")
    result = tune(fine_tune, whole, *flags)

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_classifier(*args)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(fine_tune, "evaluate_classifier", signalled)
        tune(fine_tune, parts, *flags)
    assert not [line for line in lines(parts, name) if "top1" in line]
    assert tune(fine_tune, parts, *flags) == result
    assert_same_checkpoint(name, parts, whole)


def test_labelled_images_come_again_with_other_views():
    sampler = fine_tune.LabelledSampler(np.array([5, 7]), 3, 2, 0)
    sampler.set_epoch(4)
    keys = [key for batch in sampler for key in batch]
    assert sorted(keys) == [(number, index) for number in (12, 13, 14) for index in (5, 7)]


def test_fine_tuning_for_nearest_neighbours_keeps_the_statistics_and_resumes(images, run, tmp_path):
    parts, whole, name = tmp_path / "parts", tmp_path / "whole", "paws-fine-tune-SNN"
    flags = [*arguments(images, run, *RUN), "--epochs", "3", "--saveckp_steps", "1", "--color_jitter_strength", "0.5"]
    result = tune(snn_fine_tune, whole, *flags)
    before, after = state_of(run[0])["encoder"], state_of(whole, f"{name}.pth.tar")["encoder"]
    for key in after:
        statistic = key.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(before[key], after[key]) == statistic or not before[key].any(), key
    assert [line["step"] for line in lines(whole, name) if "snn_top1" in line] == [0, 3]

    with stopped_after(1):
        tune(snn_fine_tune, parts, *flags)
    assert tune(snn_fine_tune, parts, *flags) == result
    assert_same_checkpoint(name, parts, whole)


def test_the_prediction_head_is_evaluated_where_it_is_fine_tuned(images, run, tmp_path, monkeypatch):
    seen = []

    def noting(encoder, use_pred):
        seen.append(use_pred)
        return Representation(encoder, use_pred)

    monkeypatch.setattr(evaluation, "Representation", noting)
    tune(snn_fine_tune, tmp_path, *arguments(images, run, *RUN), "--epochs", "1", "--use_pred_head", "true")
    assert seen == [True, True]  # before and after


def test_fine_tuning_beside_its_training_leaves_the_log_alone_and_refuses_other_weights(images, run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    flags = arguments(images, run, *FINE_TUNE)
    tune(fine_tune, folder, *flags)
    assert lines(folder) == lines(run[0]) and lines(folder, "paws-fine-tune")[-1]["step"] == 4
    with pytest.raises(ValueError, match="started from other weights than those of --pretrained"):
        tune(fine_tune, folder, *flags, "--pretrained", "random")


# --- Pseudo-labels ----------------------------------------------------------------------------------------------------


def test_pseudo_labels_of_a_checkpoint_are_those_of_the_end_of_the_training(images, run, tmp_path, capsys):
    flags = [*arguments(images, run, "--device", "cpu"), "--output_dir", str(tmp_path)]
    pseudo_labels.label_images(pseudo_labels.parse_args(flags))
    assert (tmp_path / "pseudo_labels.csv").read_text() == (run[0] / "pseudo_labels.csv").read_text()
    assert (tmp_path / "pictures/certainty.png").stat().st_size > 1000
    assert "% of them are right" in capsys.readouterr().out


def test_pictures_of_folders_are_labelled_and_none_is_an_error(run, tmp_path):
    pictures, labels = write_own_pictures(tmp_path, labelled=4, unlabelled=2)
    weights = ("--pretrained", run[0] / "paws-latest.pth.tar", "--device", "cpu", "--pictures", "off")
    flags = ["--data_path", pictures, "--labels", labels, *SAME, *weights, "--output_dir", tmp_path / "out"]
    flags = [str(flag) for flag in flags]
    for cache in ("none", "memory"):
        pseudo_labels.label_images(pseudo_labels.parse_args([*flags, "--cache", cache]))
        with open(tmp_path / "out/pseudo_labels.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["label"] in ("dark", "bright") for row in rows] == [True, True]
        assert [str(pictures) in row["image"] for row in rows] == [False, False]
    for i in (4, 5):
        (pictures / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the 2 images of .* can be read"):
        pseudo_labels.label_images(pseudo_labels.parse_args(flags))


@pytest.mark.parametrize("script", [snn_eval, fine_tune, snn_fine_tune, pseudo_labels])
def test_without_weights_the_run_on_the_embedded_images_is_taken_for_them_alone(script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "--pretrained is missing" in error_of(script.main, "--device", "cpu", "--data_path", "images")
    assert "run python main.py first" in error_of(script.main, "--device", "cpu")


# --- The demonstration ------------------------------------------------------------------------------------------------


def test_the_demonstration_compares_three_ways(images, tmp_path, capsys):
    flags = [*TINY, "--eval_knn_freq", "1", "--data_path", str(images), "--output_dir", str(tmp_path)]
    flags += ["--labels_per_class", "1", "3"]
    rows = few_labels.compare(few_labels.parse_args(flags))
    assert rows == json.loads((tmp_path / "few_labels.json").read_text())
    assert [row["labels_per_class"] for row in rows] == [1, 3]
    assert all(0 <= row[name] <= 100 for row in rows for name in few_labels.METHODS)
    assert "1-NN on pixels" in capsys.readouterr().out and (tmp_path / "few_labels.png").stat().st_size > 1000
    steps = [line["step"] for line in lines(tmp_path / "1-labels/supervised", "paws-fine-tune") if "loss" in line][-1]
    assert steps == 3  # as many as PAWS has made
    shutil.rmtree(tmp_path / "3-labels")
    assert few_labels.compare(few_labels.parse_args(flags)) == rows
