import json

import pytest
import torch
from torch import nn

from dino import eval_knn, eval_linear
from dino.eval_linear import FrozenFeatures
from dino.vision_transformer import VisionTransformer
from shared import distributed
from shared.images.decode import ImageError
from tests.dino.tiny import write_train_and_val
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


def small_vit():
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=3, num_heads=2).eval()


def test_published_command_lines_parse():
    line = (
        "--n_last_blocks 1 --avgpool_patchtokens true --arch vit_base --patch_size 16 --pretrained_weights w.pth "
        "--checkpoint_key teacher --epochs 100 --lr 0.001 --batch_size_per_gpu 128 --dist_url env:// --local_rank 0 "
        "--data_path /imagenet --num_workers 10 --val_freq 1 --output_dir out --num_labels 1000 --evaluate"
    )
    args = eval_linear.parse_args(line.split())
    assert (args.n_last_blocks, args.avgpool_patchtokens, args.arch, args.evaluate) == (1, True, "vit_base", True)
    defaults = eval_linear.parse_args(["--data_path", "/imagenet"])
    assert (defaults.n_last_blocks, defaults.avgpool_patchtokens, defaults.lr) == (4, False, 0.001)
    assert (defaults.epochs, defaults.batch_size_per_gpu, defaults.num_labels) == (100, 128, 1000)


def test_features_are_the_class_tokens_of_the_last_blocks():
    backbone, images = small_vit(), torch.randn(2, 3, 16, 16)
    tokens = backbone.get_intermediate_layers(images, 3)
    features = FrozenFeatures(backbone, n_last_blocks=2, avgpool_patchtokens=False)
    assert features.dim(12) == 24
    torch.testing.assert_close(features(images), torch.cat([tokens[1][:, 0], tokens[2][:, 0]], dim=1))
    torch.testing.assert_close(FrozenFeatures(backbone, 1, False)(images), backbone(images))


def test_mean_patch_token_is_interleaved_with_one_class_token_and_follows_several():
    backbone, images = small_vit(), torch.randn(2, 3, 16, 16)
    tokens = backbone.get_intermediate_layers(images, 3)
    mean = tokens[2][:, 1:].mean(dim=1)
    one = FrozenFeatures(backbone, 1, True)(images)
    torch.testing.assert_close(one[:, 0::2], tokens[2][:, 0])
    torch.testing.assert_close(one[:, 1::2], mean)
    three = FrozenFeatures(backbone, 3, True)
    assert three.dim(12) == 48 == three(images).shape[1]
    torch.testing.assert_close(three(images)[:, 36:], mean)


def test_other_networks_give_their_output():
    backbone = nn.Flatten()
    features = FrozenFeatures(backbone, n_last_blocks=4, avgpool_patchtokens=True)
    assert features.dim(12) == 12
    assert features(torch.ones(2, 3, 2, 2)).shape == (2, 12)


def test_training_reports_the_last_epoch_and_logs_the_best(data, tmp_path, capsys):
    result = run(data, tmp_path, "--epochs", 3, "--val_freq", 2)
    log = [json.loads(line) for line in (tmp_path / "linear_log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [0, 1, 2]
    assert ["test_acc1" in line for line in log] == [False, True, True]  # every second epoch and the last
    assert result["acc1"] == log[-1]["test_acc1"] > 50
    assert log[-1]["best_acc1"] == max(line.get("test_acc1", 0) for line in log)
    # 0.5 * 6 / 256, then cosine
    assert [line["train_lr"] for line in log] == pytest.approx([0.5 * 6 / 256 * x for x in (1, 0.75, 0.25)])
    assert f"after the last epoch: {result['acc1']:.2f} %" in capsys.readouterr().out


def test_an_interrupted_run_ends_like_an_uninterrupted_one(data, tmp_path, monkeypatch):
    run(data, tmp_path / "whole", "--epochs", 3)

    def interrupt_second_call(*arguments, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_one_epoch(*arguments)

    train_one_epoch = eval_linear.train_one_epoch
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(eval_linear, "train_one_epoch", interrupt_second_call)
        run(data, tmp_path / "resumed", "--epochs", 3)
    run(data, tmp_path / "resumed", "--epochs", 3)

    whole, resumed = (
        torch.load(tmp_path / name / "checkpoint.pth.tar", weights_only=True) for name in ("whole", "resumed")
    )
    assert set(whole["state_dict"]) == {"module.linear.weight", "module.linear.bias"}
    torch.testing.assert_close(resumed["state_dict"], whole["state_dict"], rtol=0, atol=0)
    assert resumed["log"] == whole["log"]
    assert run(data, tmp_path / "whole", "--epochs", 3)["acc1"] == whole["log"][-1]["test_acc1"]


def test_evaluate_validates_saved_and_released_classifiers(data, tmp_path, monkeypatch):
    result = run(data, tmp_path, "--epochs", 2)
    file = tmp_path / "checkpoint.pth.tar"
    assert run(data, tmp_path, "--evaluate", "--linear_weights", file) == result

    released = {"state_dict": torch.load(file, weights_only=True)["state_dict"]}
    torch.save(released, tmp_path / "vit_tiny_linearweights.pth")
    released = tmp_path / "vit_tiny_linearweights.pth"
    monkeypatch.setattr(eval_linear, "fetch_linear_weights", lambda arch, patch_size: released)
    assert run(data, tmp_path, "--evaluate") == result


def test_unreadable_train_images_are_replaced_and_listed_unless_they_are_to_stop_the_run(tmp_path):
    root = write_train_and_val(tmp_path / "data")
    broken = root / "train" / "green" / "002.png"
    broken.write_bytes(broken.read_bytes()[:60])
    run(root, tmp_path / "run", "--epochs", 2)
    assert (tmp_path / "run" / "bad_images.txt").read_text().split("\t")[0] == str(broken)
    log = [json.loads(line) for line in (tmp_path / "run" / "linear_log.txt").read_text().splitlines()]
    assert [line["bad_images"] for line in log] == [1, 1]
    with pytest.raises(ImageError, match=str(broken)):
        run(root, tmp_path / "strict", "--on_bad_image", "error")


def test_bad_input_is_one_clear_error(data, tmp_path):
    run(data, tmp_path, "--epochs", 1)
    file = tmp_path / "checkpoint.pth.tar"
    with pytest.raises(ValueError, match="features of other weights than random; use another --output_dir"):
        run(data, tmp_path, "--epochs", 2, "--patch_size", 8)
    with pytest.raises(SystemExit):
        run(data, tmp_path, "--val_freq", 0)
    with pytest.raises(ValueError, match=r"checkpoint.pth.tar holds .* check --arch, --n_last_blocks"):
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


def evaluate_on_rank(rank, data, output_dir):
    distributed.init = lambda *_: torch.device("cpu")  # the processes are joined already
    batch = ["--batch_size_per_gpu", "3"]  # half of the batch of one process
    torch.manual_seed(0)
    accuracies = eval_knn.eval_knn(eval_knn.parse_args([*SMALL, "--data_path", data, "--nb_knn", "3"]))
    linear = [*LINEAR, "--data_path", data, "--output_dir", output_dir, "--epochs", "2", *batch]
    return accuracies, eval_linear.eval_linear(eval_linear.parse_args(linear))


def test_two_processes_give_the_results_of_one(data, tmp_path):
    """Equal batches make equal steps; 9 val images divide unevenly."""
    torch.manual_seed(0)
    knn = eval_knn.eval_knn(eval_knn.parse_args([*SMALL, "--data_path", str(data), "--nb_knn", "3"]))
    linear = run(data, tmp_path / "one", "--epochs", 2)
    first, second = run_processes(evaluate_on_rank, 2, str(data), str(tmp_path / "two"))
    assert first[0] == knn
    assert first[1] == second[1] == pytest.approx(linear, rel=1e-4)
