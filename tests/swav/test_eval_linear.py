import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared.evaluation import frozen
from shared.images.decode import ImageError
from swav import eval_linear, evaluation
from swav.eval_linear import FrozenFeatures, RegLog
from swav.hub import CARD
from tests.swav.official_layouts import build_small, linear_checkpoint, make_network, small_resnet50
from tests.swav.tiny import write_train_and_val

SMALL = ["--pretrained", "random", "--image_size", "32", "--workers", "0", "--device", "cpu"]
SMALL += ["--num_labels", "3", "--batch_size", "6", "--lr", "0.1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_train_and_val(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    build_small(monkeypatch)


def run(data, dump_path, *flags):
    arguments = [*SMALL, "--data_path", data, "--dump_path", dump_path, *flags]
    return eval_linear.eval_linear(eval_linear.parse_args([str(argument) for argument in arguments]))


def test_published_command_lines_parse():
    line = (
        "--data_path /imagenet --pretrained swav_800ep_pretrain.pth.tar --dump_path out --seed 31 --workers 10 "
        "--arch resnet50w2 --global_pooling false --use_bn True --epochs 100 --batch_size 32 --lr 0.3 --wd 1e-6 "
        "--nesterov 0 --scheduler_type step --decay_epochs 96 96 --gamma 0.2 --final_lr 0 --dist_url env:// "
        "--world_size -1 --rank 0 --local_rank 0"
    )
    args = eval_linear.parse_args(line.split())
    assert (args.global_pooling, args.use_bn, args.nesterov, args.decay_epochs) == (False, True, False, [96, 96])
    defaults = eval_linear.parse_args(["--data_path", "/imagenet"])
    assert (defaults.arch, defaults.global_pooling, defaults.use_bn, defaults.seed) == ("resnet50", True, False, 31)
    assert (defaults.epochs, defaults.batch_size, defaults.lr, defaults.wd) == (100, 32, 0.3, 1e-6)
    assert (defaults.scheduler_type, defaults.decay_epochs, defaults.gamma) == ("cosine", [60, 80], 0.1)
    assert (defaults.final_lr, defaults.nesterov, defaults.dump_path) == (0, False, ".")


# --- Features and classifier ------------------------------------------------------------------------------------------


def test_windows_are_means_of_six_by_six_pixels_of_the_map():
    network = make_network(output_dim=0, hidden_mlp=0, nmb_prototypes=0, normalize=False)
    images = torch.randn(2, 3, 224, 224)
    pooled = FrozenFeatures(network, global_pooling=True)(images)
    windows = FrozenFeatures(network, global_pooling=False)(images)
    feature_map = network(images)
    assert feature_map.shape == (2, 256, 7, 7)
    torch.testing.assert_close(pooled, feature_map.mean(dim=(2, 3)))
    assert windows.shape == (2, 256, 2, 2)
    torch.testing.assert_close(windows[:, :, 0, 1], feature_map[:, :, :6, 1:].mean(dim=(2, 3)))


def test_classifier_normalises_channels_before_the_linear_layer():
    torch.manual_seed(0)
    classifier = RegLog((4, 2, 2), 3, use_bn=True)
    assert set(classifier.state_dict()) == {"linear.weight", "linear.bias"} | {
        f"bn.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    features = torch.randn(8, 4, 2, 2) * 3 + 1
    variance, mean = torch.var_mean(features, dim=(0, 2, 3), keepdim=True, correction=0)
    expected = classifier.linear(((features - mean) / variance.sqrt()).reshape(8, 16))
    torch.testing.assert_close(classifier(features), expected, rtol=1e-4, atol=1e-5)
    assert set(RegLog((4,), 3).state_dict()) == {"linear.weight", "linear.bias"}
    assert not RegLog((4,), 3).linear.bias.any()
    assert RegLog((2048,), 1000).linear.weight.std().item() == pytest.approx(0.01, rel=0.01)


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_training_reports_the_last_epoch_and_logs_the_best(data, tmp_path, capsys):
    result = run(data, tmp_path, "--epochs", 3, "--val_freq", 2)
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [0, 1, 2]
    assert ["test_acc1" in line for line in log] == [False, True, True]  # every second epoch and the last
    assert result["acc1"] == log[-1]["test_acc1"] > 50
    assert log[-1]["best_acc1"] == max(line.get("test_acc1", 0) for line in log)
    assert [line["train_lr"] for line in log] == pytest.approx([0.1, 0.075, 0.025])  # cosine, not scaled
    assert f"after the last epoch: {result['acc1']:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        (["--scheduler_type", "step", "--decay_epochs", 1, 2, "--gamma", 0.5], [0.1, 0.05, 0.025]),
        (["--final_lr", 0.02], [0.1, 0.08, 0.04]),
    ],
)
def test_step_schedule_and_cosine_floor(flags, rates, data, tmp_path):
    run(data, tmp_path, "--epochs", 3, "--val_freq", 3, *flags)
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["train_lr"] for line in log] == pytest.approx(rates)


def test_windows_with_batch_norms_learn(data, tmp_path):
    flags = ["--image_size", 192, "--global_pooling", "false", "--use_bn", "true", "--epochs", 2]
    run(data, tmp_path, *flags)
    checkpoint = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    assert checkpoint["log"][0]["train_loss"] < 1  # three steps; ln 3 is 1.1
    state = checkpoint["state_dict"]
    assert state["module.linear.weight"].shape == (3, 256)
    assert state["module.bn.num_batches_tracked"] == 6


def interrupting(function, call: int):
    """``function``, except that its call number ``call``, counted from 1, raises ``KeyboardInterrupt``."""
    calls = itertools.count(1)

    def interrupted(*args, **kwargs):
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return interrupted


@pytest.mark.parametrize("official", [False, True])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(official, data, tmp_path, monkeypatch):
    result = run(data, tmp_path / "whole", "--epochs", 2)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(evaluation, "train_one_epoch", interrupting(evaluation.train_one_epoch, call=2))
        run(data, tmp_path / "resumed", "--epochs", 2)
    if official:  # neither our flags nor our log, and a learning rate that is a numpy number
        file = tmp_path / "resumed" / "checkpoint.pth.tar"
        checkpoint = torch.load(file, weights_only=True)
        (group,) = checkpoint["optimizer"]["param_groups"]
        group["lr"] = np.float64(group["lr"])
        torch.save({k: v for k, v in checkpoint.items() if k not in ("flags", "pretrained", "log")}, file)
    assert run(data, tmp_path / "resumed", "--epochs", 2) == result

    whole, resumed = (
        torch.load(tmp_path / name / "checkpoint.pth.tar", weights_only=True) for name in ("whole", "resumed")
    )
    assert set(whole["state_dict"]) == {"module.linear.weight", "module.linear.bias"}
    torch.testing.assert_close(resumed["state_dict"], whole["state_dict"], rtol=0, atol=0)
    assert resumed["log"] == (whole["log"][1:] if official else whole["log"])
    assert run(data, tmp_path / "whole", "--epochs", 2) == result  # there is nothing left to train


def test_evaluate_validates_saved_and_official_classifiers(data, tmp_path, monkeypatch):
    result = run(data, tmp_path, "--epochs", 2)
    file = tmp_path / "checkpoint.pth.tar"
    assert run(data, tmp_path, "--evaluate", "--linear_weights", file) == result

    torch.save(linear_checkpoint(), tmp_path / "official.pth.tar")
    official = run(data, tmp_path, "--evaluate", "--linear_weights", tmp_path / "official.pth.tar")
    monkeypatch.setattr(
        eval_linear, "fetch", lambda name: tmp_path / {"swav_800ep_eval_linear.pth.tar": "official.pth.tar"}[name]
    )
    monkeypatch.setattr(eval_linear, "load_backbone", lambda *_: random_trunk())
    assert run(data, tmp_path, "--evaluate", "--pretrained", "swav_800ep") == official


def random_trunk():
    torch.manual_seed(31)  # as --seed
    return small_resnet50().eval().requires_grad_(False)


def test_unreadable_train_images_are_replaced_and_listed_unless_they_are_to_stop_the_run(tmp_path):
    root = write_train_and_val(tmp_path / "data")
    broken = root / "train" / "green" / "002.png"
    broken.write_bytes(broken.read_bytes()[:60])
    run(root, tmp_path / "run", "--epochs", 2)
    assert (tmp_path / "run" / "bad_images.txt").read_text().split("\t")[0] == str(broken)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert [line["bad_images"] for line in log] == [1, 1]
    with pytest.raises(ImageError, match=str(broken)):
        run(root, tmp_path / "strict", "--on_bad_image", "error")


def test_bad_input_is_one_clear_error(data, tmp_path):
    run(data, tmp_path, "--epochs", 1)
    file = tmp_path / "checkpoint.pth.tar"
    with pytest.raises(ValueError, match=r"checkpoint.pth.tar: 1 of 2 entries do not fit, the first is linear.weight"):
        run(data, tmp_path, "--evaluate", "--linear_weights", file, "--arch", "resnet18")
    with pytest.raises(
        ValueError, match="released linear classifier is that of swav_800ep, not of --pretrained random"
    ):
        run(data, tmp_path, "--evaluate")
    with pytest.raises(ValueError, match=r"--linear_weights .* is not a file"):
        run(data, tmp_path, "--evaluate", "--linear_weights", tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="--num_labels 2 is less than the 3 classes"):
        run(data, tmp_path, "--num_labels", 2)
    with pytest.raises(ValueError, match="--use_bn true needs --global_pooling false"):
        run(data, tmp_path, "--use_bn", "true")
    with pytest.raises(ValueError, match="a feature map of 1 x 1 has no 6x6 window; raise --image_size"):
        run(data, tmp_path, "--global_pooling", "false")
    with pytest.raises(ValueError, match="--global_pooling false needs the feature map of resnet50"):
        run(data, tmp_path, "--global_pooling", "false", "--arch", "resnet18")
    with pytest.raises(ValueError, match=r"--epochs 2 does not fit .* was written with --epochs 1"):
        run(data, tmp_path, "--epochs", 2)
    with pytest.raises(ValueError, match=r"started from other weights than those of --pretrained; use another"):
        run(data, tmp_path, "--epochs", 1, "--seed", 32)
    with pytest.raises(SystemExit):
        run(data, tmp_path, "--val_freq", 0)
    with pytest.raises(ValueError, match=r"--data_path .* no such file or folder"):
        run(tmp_path / "nowhere", tmp_path)
    torch.save({"epoch": 3, "state_dict": {}, "optimizer": {}}, tmp_path / "checkpoint.pth.tar")
    with pytest.raises(ValueError, match="is a checkpoint of another script; choose another --dump_path"):
        run(data, tmp_path, "--epochs", 1)


def test_wrong_predictions_cost_what_cross_entropy_says(data, tmp_path):
    """The reported loss and accuracies are those of a loop over the val images."""
    result = run(data, tmp_path, "--epochs", 1)
    state = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["state_dict"]
    _, val = frozen.labelled_sources(str(data), None)
    network = random_trunk()
    dataset = frozen.EvalDataset(val, frozen.eval_transform(CARD, 32, network))
    losses, hits = [], 0
    for image, label, _ in dataset:
        logits = F.linear(network(image[None]), state["module.linear.weight"], state["module.linear.bias"])
        losses.append(F.cross_entropy(logits, torch.tensor([label])).item())
        hits += int(logits.argmax()) == label
    assert result["loss"] == pytest.approx(sum(losses) / len(dataset), rel=1e-4)
    assert result["acc1"] == pytest.approx(100 * hits / len(dataset))
    assert isinstance(RegLog((4,), 3).bn, nn.Identity)
