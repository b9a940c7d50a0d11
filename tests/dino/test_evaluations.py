"""Nearest neighbours and linear classifiers: the real scripts on pictures of three colours."""

import json

import pytest
import torch

from dino import eval_knn, eval_linear
from shared.networks.weights import run_file
from tests.pictures import COLOURS, write_class_folders, write_train_and_val
from tests.processes import run_processes

SMALL = ["--arch", "vit_tiny", "--pretrained_weights", "random", "--image_size", "32", "--num_workers", "0"]
SMALL += ["--device", "cpu"]
LINEAR = [*SMALL, "--num_labels", "3", "--lr", "0.5", "--batch_size_per_gpu", "6"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_train_and_val(tmp_path_factory.mktemp("data"))


def run(data, output_dir, *flags):
    arguments = [*LINEAR, "--data_path", data, "--output_dir", output_dir, *flags]
    return eval_linear.eval_linear(eval_linear.parse_args([str(argument) for argument in arguments]))


def classify(*flags):
    return eval_knn.eval_knn(eval_knn.parse_args([*SMALL, *map(str, flags)]))


# --- Nearest neighbours -----------------------------------------------------------------------------------------------


def test_dumped_features_give_the_same_accuracy_when_loaded(data, tmp_path):
    extracted = classify("--data_path", data, "--nb_knn", 3, "--dump_features", tmp_path)
    assert classify("--load_features", tmp_path, "--nb_knn", 3) == extracted
    features, labels = (torch.load(tmp_path / name, weights_only=True) for name in ("testfeat.pth", "testlabels.pth"))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(9))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_bad_input_of_the_neighbours_is_one_clear_error(data, tmp_path):
    with pytest.raises(ValueError, match="--nb_knn 19 is more than the 18 images"):
        classify("--data_path", data, "--nb_knn", 19)
    with pytest.raises(ValueError, match=r"--data_path .*nowhere: no such file or folder"):
        classify("--data_path", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"--load_features .*: no trainfeat.pth"):
        classify("--load_features", tmp_path)

    write_class_folders(tmp_path / "one", 3, {"blue": COLOURS["blue"]})
    with pytest.raises(ValueError, match="only one class, 'blue'"):
        classify("--data_path", tmp_path / "one")


# --- Linear classifiers -----------------------------------------------------------------------------------------------


def test_the_learning_rate_is_scaled_and_falls_as_a_cosine(data, tmp_path):
    run(data, tmp_path, "--epochs", 3, "--val_freq", 3)
    log = [json.loads(line) for line in (tmp_path / "linear_log.txt").read_text().splitlines()]
    assert [line["train_lr"] for line in log] == pytest.approx([0.5 * 6 / 256 * x for x in (1, 0.75, 0.25)])


def test_evaluate_validates_saved_and_released_classifiers(data, tmp_path, monkeypatch):
    result = run(data, tmp_path, "--epochs", 2)
    file = tmp_path / "checkpoint.pth.tar"
    assert run(data, tmp_path, "--evaluate", "--linear_weights", file) == result

    released = {"state_dict": torch.load(file, weights_only=True)["state_dict"]}
    torch.save(released, tmp_path / "vit_tiny_linearweights.pth")
    released = tmp_path / "vit_tiny_linearweights.pth"
    monkeypatch.setattr(eval_linear, "fetch_linear_weights", lambda arch, patch_size: released)
    assert run(data, tmp_path, "--evaluate") == result


def test_bad_input_is_one_clear_error(data, tmp_path):
    run(data, tmp_path, "--epochs", 1)
    file = tmp_path / "checkpoint.pth.tar"
    with pytest.raises(ValueError, match=r"checkpoint.pth.tar does not fill .*size mismatch for linear.weight"):
        run(data, tmp_path, "--evaluate", "--linear_weights", file, "--n_last_blocks", 1)
    with pytest.raises(ValueError, match="no linear weights are released for --arch vit_tiny"):
        run(data, tmp_path, "--evaluate")
    with pytest.raises(ValueError, match=r"--linear_weights .* is not a file"):
        run(data, tmp_path, "--evaluate", "--linear_weights", tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="--num_labels 2 is less than the 3 classes"):
        run(data, tmp_path, "--num_labels", 2)
    with pytest.raises(ValueError, match="--n_last_blocks 13 of a ViT with 12 blocks"):
        run(data, tmp_path, "--n_last_blocks", 13)
    with pytest.raises(ValueError, match=r"--data_path .* no such file or folder"):
        run(tmp_path / "nowhere", tmp_path)


def test_a_probe_is_not_gone_on_with_as_another_one_and_does_not_hide_the_run(data, tmp_path):
    torch.save({"teacher": {}, "args": {"arch": "vit_tiny"}}, tmp_path / "checkpoint.pth")
    run(data, tmp_path, "--epochs", 1)
    assert (tmp_path / "checkpoint.pth.tar").exists() and run_file(tmp_path) == tmp_path / "checkpoint.pth"
    for changed in (("--epochs", 2), ("--epochs", 1, "--lr", 7)):
        message = f"{changed[-2]} {changed[-1]}.* does not fit .* was written with {changed[-2]}"
        with pytest.raises(ValueError, match=message):
            run(data, tmp_path, *changed)


def evaluate_on_rank(rank, data, output_dir):
    batch = ["--batch_size_per_gpu", "3"]  # half of the batch of one process
    torch.manual_seed(rank)  # the random network is that of --seed on both
    accuracies = classify("--data_path", data, "--nb_knn", 3)
    linear = [*LINEAR, "--data_path", data, "--output_dir", output_dir, "--epochs", "2", *batch]
    return accuracies, eval_linear.eval_linear(eval_linear.parse_args(linear))


def test_two_processes_give_the_results_of_one(data, tmp_path):
    """Equal batches make equal steps; 9 val images divide unevenly."""
    knn = classify("--data_path", data, "--nb_knn", 3)
    linear = run(data, tmp_path / "one", "--epochs", 2)
    first, second = run_processes(evaluate_on_rank, 2, str(data), str(tmp_path / "two"))
    assert first[0] == knn
    assert first[1] == second[1] == pytest.approx(linear, rel=1e-4)
