import json

import numpy as np
import pytest
import torch
from torch import nn

from shared import distributed
from shared.evaluation import frozen
from shared.images.loading import BadImages
from shared.images.sources import open_source
from shared.images.views import ViewRecipe
from swav import eval_semisup
from swav.eval_semisup import drawn_images, labelled_subset
from swav.hub import CARD
from tests.processes import run_processes
from tests.swav.official_layouts import (
    build_small,
    finetuned_checkpoint,
    make_network,
    small_resnet50,
    training_checkpoint,
)
from tests.swav.tiny import COLOURS, write_picture, write_train_and_val

SMALL = ["--pretrained", "random", "--image_size", "64", "--workers", "0", "--device", "cpu"]
SMALL += ["--num_labels", "3", "--batch_size", "6", "--labels_perc", "67"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_train_and_val(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    build_small(monkeypatch)


def run(data, dump_path, *flags):
    arguments = [*SMALL, "--data_path", data, "--dump_path", dump_path, *flags]
    return eval_semisup.eval_semisup(eval_semisup.parse_args([str(argument) for argument in arguments]))


def test_published_command_lines_parse():
    line = (
        "--data_path /imagenet --pretrained swav_800ep_pretrain.pth.tar --labels_perc 1 --lr 0.02 --lr_last_layer 5 "
        "--dump_path out --seed 31 --workers 10 --arch resnet50 --epochs 20 --batch_size 32 --decay_epochs 12 16 "
        "--gamma 0.2 --dist_url env:// --world_size -1 --rank 0 --local_rank 0"
    )
    args = eval_semisup.parse_args(line.split())
    assert (args.labels_perc, args.lr, args.lr_last_layer) == (1, 0.02, 5)
    defaults = eval_semisup.parse_args(["--data_path", "/imagenet"])
    assert (defaults.labels_perc, defaults.lr, defaults.lr_last_layer, defaults.seed) == (10, 0.01, 0.2, 31)
    assert (defaults.epochs, defaults.batch_size, defaults.decay_epochs, defaults.gamma) == (20, 32, [12, 16], 0.2)


# --- Labelled images --------------------------------------------------------------------------------------------------


@pytest.fixture
def imagenet(tmp_path):
    """Folders and file names as ImageNet's."""
    for c in range(3):
        for i in range(4):
            path = tmp_path / "train" / f"n0000000{c}" / f"n0000000{c}_{10 * i}.JPEG"
            write_picture(path, 10 * c + i, list(COLOURS.values())[c])
    return tmp_path


def test_list_names_the_images_as_the_published_ones_do(imagenet):
    (imagenet / "1percent.txt").write_text("n00000002_10.JPEG\nn00000000_0.JPEG\n\nn00000001/n00000001_30.JPEG\n")
    subset = labelled_subset(open_source(str(imagenet / "train"), "all"), 1, str(imagenet / "1percent.txt"), seed=0)
    names = [subset.path(i).rsplit("/", 1)[1] for i in range(len(subset))]
    assert names == ["n00000000_0.JPEG", "n00000001_30.JPEG", "n00000002_10.JPEG"]
    assert [subset.label(i) for i in range(3)] == [0, 1, 2]
    assert subset.classes == ["n00000000", "n00000001", "n00000002"]
    assert subset.load(0).decode().shape == (40, 48, 3)


def test_list_that_does_not_fit_the_images_is_refused(imagenet):
    train = open_source(str(imagenet / "train"), "all")
    (imagenet / "1percent.txt").write_text("n00000000_0.JPEG\nn00000000_7.JPEG\nn00000009_1.JPEG\n")
    first = "2 of its 3 images are not in .*, the first is n00000000/n00000000_7.JPEG"
    with pytest.raises(ValueError, match=first):
        labelled_subset(train, 1, str(imagenet / "1percent.txt"), seed=0)
    with pytest.raises(ValueError, match="--labels_perc 0 is outside"):
        labelled_subset(train, 0, None, seed=0)


def test_without_a_list_every_class_gives_its_share():
    labels = np.repeat([0, 1, 2], [100, 50, 3])
    chosen = drawn_images(labels, 10, seed=5)
    assert np.bincount(labels[chosen]).tolist() == [10, 5, 1]
    assert len(set(chosen.tolist())) == 16
    np.testing.assert_array_equal(chosen, drawn_images(labels, 10, seed=5))
    assert not np.array_equal(chosen, drawn_images(labels, 10, seed=6))
    np.testing.assert_array_equal(drawn_images(labels, 100, seed=5), np.arange(153))


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_trunk_and_last_layer_learn_at_their_own_rates(data, tmp_path, capsys):
    flags = ["--epochs", 3, "--lr", 0.02, "--lr_last_layer", 0.5, "--decay_epochs", 1, 2]
    torch.save(training_checkpoint(make_network()), tmp_path / "pretrained.pth.tar")
    result = run(data, tmp_path / "run", "--pretrained", tmp_path / "pretrained.pth.tar", *flags)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert [line["train_lr"] for line in log] == pytest.approx([0.02, 0.004, 0.0008])
    assert [line["train_lr_last_layer"] for line in log] == pytest.approx([0.5, 0.1, 0.02])
    assert result["acc1"] == log[-1]["test_acc1"] > 50
    assert f"after the last epoch: {result['acc1']:.2f} %" in capsys.readouterr().out

    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pth.tar", weights_only=True)
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
    run(data, tmp_path, *flags)
    state = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["state_dict"]

    torch.manual_seed(31)
    network = small_resnet50()
    network.add_heads(256, output_dim=3)
    train, _ = frozen.labelled_sources(str(data), None)
    subset = labelled_subset(train, 67, None, 31)
    assert len(subset) == 12
    recipe, device = ViewRecipe(64, (0.08, 1.0), interpolation="bilinear"), torch.device("cpu")
    loader, _ = frozen.train_crops(subset, recipe, 12, 31, 3, BadImages(len(subset)), 0, device)
    images, labels = next(iter(frozen.on_device(CARD, loader, device)))
    nn.functional.cross_entropy(network.train()(images), labels).backward()
    head = network.projection_head
    torch.testing.assert_close(state["module.projection_head.weight"], head.weight - 0.5 * head.weight.grad)
    torch.testing.assert_close(state["module.projection_head.bias"], head.bias - 0.5 * head.bias.grad)
    torch.testing.assert_close(state["module.layer4.0.conv3.weight"], network.layer4[0].conv3.weight.detach())


def test_a_last_batch_of_one_image_is_left_out(data, tmp_path):
    """At 32 pixels the last feature map is one pixel: batch norms could not normalise it."""
    result = run(data, tmp_path, "--epochs", 1, "--image_size", 32, "--labels_perc", 67, "--batch_size", 11)
    assert 0 <= result["acc1"] <= 100


def test_evaluate_validates_fine_tuned_networks(data, tmp_path):
    result = run(data, tmp_path, "--epochs", 1)
    assert run(data, tmp_path, "--evaluate", "--pretrained", tmp_path / "checkpoint.pth.tar") == pytest.approx(result)
    network, checkpoint = finetuned_checkpoint()
    torch.save(checkpoint, tmp_path / "official.pth.tar")
    accuracy = run(data, tmp_path, "--evaluate", "--pretrained", tmp_path / "official.pth.tar")["acc1"]
    _, val = frozen.labelled_sources(str(data), None)
    dataset = frozen.EvalDataset(val, frozen.eval_transform(CARD, 64, network))
    hits = [int(network(image[None]).argmax()) == label for image, label, _ in dataset]
    assert accuracy == pytest.approx(100 * np.mean(hits))


def test_only_a_fine_tuned_network_is_validated(data, tmp_path):
    torch.save(training_checkpoint(make_network()), tmp_path / "pretrained.pth.tar")
    with pytest.raises(
        ValueError, match=r"--evaluate: .*pretrained.pth.tar holds no fine-tuned network with 3 outputs"
    ):
        run(data, tmp_path, "--evaluate", "--pretrained", tmp_path / "pretrained.pth.tar")


# tiny networks with batches of 6 double rounding errors at every large step
GENTLE = ["--lr", "0.001", "--lr_last_layer", "0.02", "--epochs", "2"]


def finetune_on_rank(rank, data, dump_path):
    from swav import resnet50

    distributed.init = lambda *_: torch.device("cpu")  # the processes are joined already
    resnet50.resnet50 = small_resnet50
    arguments = [*SMALL, *GENTLE, "--data_path", data, "--dump_path", dump_path, "--batch_size", "3"]
    return eval_semisup.eval_semisup(eval_semisup.parse_args(arguments))


def test_two_processes_give_the_results_of_one(data, tmp_path):
    """Equal batches make equal steps: batch norms see the images of both processes."""
    one = run(data, tmp_path / "one", *GENTLE)
    first, second = run_processes(finetune_on_rank, 2, str(data), str(tmp_path / "two"))
    assert first == second == pytest.approx(one, rel=1e-3)
