"""Linear classification, fine-tuning with few labels, and k-NN: the real scripts on pictures of three colours."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared.evaluation import frozen, linear
from shared.images.labelled import open_labelled
from shared.images.sources import open_source
from shared.images.subsets import drawn_images, labelled_subset
from swav import eval_linear, eval_semisup, evaluation, resnet50
from swav.hub import CARD
from tests.interruption import interrupted
from tests.pictures import write_train_and_val
from tests.processes import run_processes
from tests.swav.tiny import (
    build_small,
    finetuned_checkpoint,
    linear_checkpoint,
    make_network,
    small_resnet50,
    training_checkpoint,
)

SMALL = ["--pretrained", "random", "--image_size", "32", "--workers", "0", "--device", "cpu"]
LINEAR = [*SMALL, "--num_labels", "3", "--batch_size", "6", "--lr", "0.1"]
SEMISUP = [*SMALL, "--image_size", "64", "--num_labels", "3", "--batch_size", "6", "--labels_perc", "67"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_train_and_val(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    build_small(monkeypatch)


def probe(data, folder, *flags):
    arguments = [*LINEAR, "--data_path", data, "--dump_path", folder, *flags]
    return eval_linear.eval_linear(eval_linear.parse_args(list(map(str, arguments))))


def finetune(data, folder, *flags):
    arguments = [*SEMISUP, "--data_path", data, "--dump_path", folder, *flags]
    return eval_semisup.eval_semisup(eval_semisup.parse_args(list(map(str, arguments))))


def checkpoint_of(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pth.tar", "cpu", weights_only=True)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


# --- Linear classification --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        (["--scheduler_type", "step", "--decay_epochs", 1, 2, "--gamma", 0.5], [0.1, 0.05, 0.025]),
        (["--final_lr", 0.02], [0.1, 0.08, 0.04]),
        ([], [0.1, 0.075, 0.025]),  # not scaled
    ],
)
def test_step_schedule_and_cosine_floor(flags, rates, data, tmp_path):
    probe(data, tmp_path, "--epochs", 3, "--val_freq", 3, *flags)
    log = log_of(tmp_path)
    assert [line["train_lr"] for line in log] == pytest.approx(rates)


def test_windows_with_batch_norms_learn(data, tmp_path):
    flags = ["--image_size", 192, "--global_pooling", "false", "--use_bn", "true", "--epochs", 2]
    probe(data, tmp_path, *flags)
    checkpoint = checkpoint_of(tmp_path)
    assert checkpoint["log"][0]["train_loss"] < 1  # three steps; ln 3 is 1.1
    state = checkpoint["state_dict"]
    assert state["module.linear.weight"].shape == (3, 256)
    assert state["module.bn.num_batches_tracked"] == 6


def test_a_run_of_the_official_code_goes_on(data, tmp_path, monkeypatch):
    """Neither our flags nor our log, and a learning rate that is a numpy number."""
    monkeypatch.setattr(linear, "SHORT_EPOCH_S", 0)  # every epoch is saved
    result = probe(data, tmp_path / "whole", "--epochs", 2)
    with interrupted(linear, "train_one_epoch", 2):
        probe(data, tmp_path / "resumed", "--epochs", 2)
    checkpoint = checkpoint_of(tmp_path / "resumed")
    (group,) = checkpoint["optimizer"]["param_groups"]
    group["lr"] = np.float64(group["lr"])
    official = {k: v for k, v in checkpoint.items() if k not in ("flags", "pretrained", "log")}
    torch.save(official, tmp_path / "resumed" / "checkpoint.pth.tar")
    assert probe(data, tmp_path / "resumed", "--epochs", 2) == result
    whole, resumed = (checkpoint_of(tmp_path / name) for name in ("whole", "resumed"))
    assert set(whole["state_dict"]) == {"module.linear.weight", "module.linear.bias"}
    torch.testing.assert_close(resumed["state_dict"], whole["state_dict"], rtol=0, atol=0)
    assert resumed["log"] == whole["log"][1:]


def test_evaluate_validates_saved_and_official_classifiers(data, tmp_path, monkeypatch):
    result = probe(data, tmp_path, "--epochs", 2)
    file = tmp_path / "checkpoint.pth.tar"
    assert probe(data, tmp_path, "--evaluate", "--linear_weights", file) == result

    torch.save(linear_checkpoint(), tmp_path / "official.pth.tar")
    official = probe(data, tmp_path, "--evaluate", "--linear_weights", tmp_path / "official.pth.tar")
    monkeypatch.setattr(
        eval_linear, "fetch", lambda name: tmp_path / {"swav_800ep_eval_linear.pth.tar": "official.pth.tar"}[name]
    )
    monkeypatch.setattr(evaluation, "load_backbone", lambda *_: random_trunk())
    assert probe(data, tmp_path, "--evaluate", "--pretrained", "swav_800ep") == official


def random_trunk():
    torch.manual_seed(31)  # as --seed
    return small_resnet50().eval().requires_grad_(False)


def test_bad_input_is_one_clear_error(data, tmp_path):
    probe(data, tmp_path, "--epochs", 1)
    classifier = ["--evaluate", "--linear_weights", tmp_path / "checkpoint.pth.tar"]
    for flags, message in (
        ([*classifier, "--arch", "resnet18"], "checkpoint.pth.tar does not fill .*size mismatch for linear.weight"),
        (["--evaluate"], "classifier is that of swav_800ep, not of --pretrained random"),
        (["--evaluate", "--linear_weights", "nowhere.pth"], "--linear_weights nowhere.pth is not a file"),
        (["--use_bn", "true"], "--use_bn true needs --global_pooling false"),
        (["--global_pooling", "false"], "a feature map of 1 x 1 has no 6x6 window; raise --image_size"),
        (
            ["--global_pooling", "false", "--arch", "resnet18"],
            "--global_pooling false needs the feature map of resnet50",
        ),
        (["--epochs", 2], "--epochs 2 does not fit .* was written with --epochs 1"),
    ):
        with pytest.raises(ValueError, match=message):
            probe(data, tmp_path, *flags)


# --- Fine-tuning with few labels --------------------------------------------------------------------------------------


def test_without_a_list_every_class_gives_its_share():
    labels = np.repeat([0, 1, 2], [100, 50, 3])
    chosen = drawn_images(labels, 10, seed=5)
    assert np.bincount(labels[chosen]).tolist() == [10, 5, 1]
    assert len(set(chosen.tolist())) == 16
    np.testing.assert_array_equal(chosen, drawn_images(labels, 10, seed=5))
    assert not np.array_equal(chosen, drawn_images(labels, 10, seed=6))
    np.testing.assert_array_equal(drawn_images(labels, 100, seed=5), np.arange(153))
    with pytest.raises(ValueError, match="--labels_perc 0 is outside"):
        labelled_subset(open_source(None, "train"), 0, None, seed=0)


def test_trunk_and_last_layer_learn_at_their_own_rates(data, tmp_path, capsys):
    flags = ["--epochs", 3, "--lr", 0.02, "--lr_last_layer", 0.5, "--decay_epochs", 1, 2]
    torch.save(training_checkpoint(make_network()), tmp_path / "pretrained.pth.tar")
    result = finetune(data, tmp_path / "run", "--pretrained", tmp_path / "pretrained.pth.tar", *flags)
    log = log_of(tmp_path / "run")
    assert [line["train_lr"] for line in log] == pytest.approx([0.02, 0.004, 0.0008])
    assert [line["train_lr_last_layer"] for line in log] == pytest.approx([0.5, 0.1, 0.02])
    assert result["acc1"] == log[-1]["test_acc1"] > 50
    assert f"after the last epoch: {result['acc1']:.2f} %" in capsys.readouterr().out

    checkpoint = checkpoint_of(tmp_path / "run")
    groups = checkpoint["optimizer"]["param_groups"]
    assert [len(group["params"]) for group in groups] == [len(list(small_resnet50().parameters())), 2]
    assert all((group["momentum"], group["weight_decay"]) == (0.9, 0) for group in groups)
    assert checkpoint["best_acc"][0] == max(line["test_acc1"] for line in log)
    state, before = checkpoint["state_dict"], make_network().state_dict()
    assert state["module.projection_head.weight"].shape == (3, 256)
    assert not torch.equal(state["module.conv1.weight"], before["conv1.weight"])
    assert not torch.equal(state["module.bn1.running_mean"], before["bn1.running_mean"])
    assert not any("prototypes" in name for name in state)


def test_one_step_is_that_of_a_plain_loop(data, tmp_path):
    """With a learning rate of 0 the trunk keeps its weights; the last layer makes one step of SGD."""
    flags = ["--epochs", 1, "--lr", 0, "--lr_last_layer", 0.5, "--batch_size", 12, "--labels_perc", 67]
    finetune(data, tmp_path, *flags)
    state = checkpoint_of(tmp_path)["state_dict"]

    torch.manual_seed(31)
    network = small_resnet50()
    network.add_heads(256, output_dim=3)
    train, _ = open_labelled(str(data), None)
    subset = labelled_subset(train, 67, None, 31)
    assert len(subset) == 12
    where = ["--data_path", str(data), "--output_dir", str(tmp_path)]
    args = eval_semisup.parse_args([*SEMISUP, "--batch_size", "12", *where])
    transform = frozen.eval_transform(CARD, 64, network)
    crops = frozen.TrainCrops(args, CARD, subset, transform, torch.device("cpu"))
    images, labels = next(crops(0))
    F.cross_entropy(network.train()(images), labels).backward()
    head = network.projection_head
    torch.testing.assert_close(state["module.projection_head.weight"], head.weight - 0.5 * head.weight.grad)
    torch.testing.assert_close(state["module.projection_head.bias"], head.bias - 0.5 * head.bias.grad)
    torch.testing.assert_close(state["module.layer4.0.conv3.weight"], network.layer4[0].conv3.weight.detach())


def test_a_last_batch_of_one_image_is_left_out(data, tmp_path):
    """At 32 pixels the last feature map is one pixel: batch norms could not normalise it."""
    result = finetune(data, tmp_path, "--epochs", 1, "--image_size", 32, "--labels_perc", 67, "--batch_size", 11)
    assert 0 <= result["acc1"] <= 100


def test_evaluate_validates_fine_tuned_networks(data, tmp_path):
    result = finetune(data, tmp_path, "--epochs", 1)
    assert finetune(data, tmp_path, "--evaluate", "--pretrained", tmp_path / "checkpoint.pth.tar") == pytest.approx(
        result
    )
    network, checkpoint = finetuned_checkpoint()
    torch.save(checkpoint, tmp_path / "official.pth.tar")
    accuracy = finetune(data, tmp_path, "--evaluate", "--pretrained", tmp_path / "official.pth.tar")["acc1"]
    _, val = open_labelled(str(data), None)
    dataset = frozen.EvalDataset(val, frozen.eval_transform(CARD, 64, network))
    hits = [int(network(image[None]).argmax()) == label for image, label, _ in dataset]
    assert accuracy == pytest.approx(100 * np.mean(hits))


def test_only_a_fine_tuned_network_is_validated(data, tmp_path):
    torch.save(training_checkpoint(make_network()), tmp_path / "pretrained.pth.tar")
    with pytest.raises(ValueError, match=r"pretrained.pth.tar holds no fine-tuned network with 3 outputs"):
        finetune(data, tmp_path, "--evaluate", "--pretrained", tmp_path / "pretrained.pth.tar")


# tiny networks with batches of 6 double rounding errors at every large step
GENTLE = ["--lr", "0.001", "--lr_last_layer", "0.02", "--epochs", "2"]


def finetune_on_rank(rank, data, dump_path):
    resnet50.resnet50 = small_resnet50
    return finetune(data, dump_path, *GENTLE, "--batch_size", 3)


def test_two_processes_give_the_results_of_one(data, tmp_path):
    """Equal batches make equal steps: batch norms see the images of both processes."""
    one = finetune(data, tmp_path / "one", *GENTLE)
    first, second = run_processes(finetune_on_rank, 2, str(data), str(tmp_path / "two"))
    assert first == second == pytest.approx(one, rel=1e-3)
