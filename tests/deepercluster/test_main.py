"""The training: one process for all groups, resuming, official files, zips, flags."""

import csv
import shutil
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import deepcluster.main
from deepercluster.clustering import Clusters, Layout
from deepercluster.hub import from_official, load_network
from deepercluster.main import hierarchical_loss, parse_args
from deepercluster.vgg16 import VGG16
from shared.images.decode import read_image
from shared.images.zipped import ZippedImages
from shared.run.run import Run
from tests.deepcluster import tiny as deepcluster_tiny
from tests.deepercluster.tiny import BODY, FLAGS, train
from tests.processes import run_processes
from tests.reliability.runs import assert_same
from tests.run_folders import losses, state_of, stopped_after


def gradients_of_rank(rank: int, images: str, folder: str) -> list:
    """Of trunk, scores of super-classes and of this process's sub-classes, in the first step."""
    nn.Dropout.forward = lambda self, x: x  # which every process draws for itself
    found = []

    def keep(run, norms, *optimizers):
        found.extend([p.grad.clone() for g in o.param_groups for p in g["params"]] for o in optimizers)
        raise KeyboardInterrupt

    Run.update = keep
    try:
        train(folder, "--data_path", images, *"--batch_size 2 --super_classes 4 --k 3 --amp fp32".split())
    except KeyboardInterrupt:
        return found


def test_one_process_has_the_gradients_of_four_groups(images, tmp_path):
    (alone,) = run_processes(gradients_of_rank, 1, str(images), str(tmp_path / "1"))
    groups = run_processes(gradients_of_rank, 4, str(images), str(tmp_path / "4"))
    scale = [max(float(g.abs().max()) for g in part) for part in alone]
    for trunk, scores, _ in groups:
        for part, expected, size in zip((trunk, scores), alone, scale, strict=False):
            for found, wanted in zip(part, expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * size)
    together = [gradient for _, _, own in groups for gradient in own]
    for found, wanted in zip(together, alone[2], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * scale[2])


def losses_of_rank(rank: int, images: str, folder: str, batch_size: int) -> list:
    nn.Dropout.forward = lambda self, x: x
    flags = f"--super_classes 2 --rotnet 0 --k 4 --reassignment 9 --batch_size {batch_size} --amp fp32 --lr 0.01"
    train(folder, "--data_path", images, *flags.split(), "--log_freq", 1, "--epochs", 3)
    return losses(folder)


def test_two_processes_of_a_training_group_learn_as_one_with_their_images(images, tmp_path):
    one = run_processes(losses_of_rank, 2, str(images), str(tmp_path / "2"), 2)[0]
    two = run_processes(losses_of_rank, 4, str(images), str(tmp_path / "4"), 1)[0]
    assert len(one) == 3 and two == pytest.approx(one, rel=1e-4)
    states = [state_of(tmp_path / name)["sub_classes"] for name in "24"]
    for found, expected in zip(*states, strict=True):
        assert len(found) == 2
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_an_interrupted_run_goes_on_as_it_would_have(images, tmp_path):
    flags = ("--data_path", images, "--epochs", 3, "--reassignment", 2)
    found = train(tmp_path / "whole", *flags)
    assert [line["step"] for line in found if "clusters" in line] == [0, 6, 9]
    for updates in (4, 3):  # within epochs 1 and 2
        with stopped_after(updates):
            train(tmp_path / "parts", *flags)
    train(tmp_path / "parts", *flags, "--workers", 1)
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    for state in (whole, parts):
        state.pop("args"), state["log"].pop("lengths")
    assert_same(whole, parts, "checkpoint")
    assert (tmp_path / "whole/checkpoints/checkpoint2.pth.tar").exists()
    with pytest.raises(ValueError, match="--image_size 64 does not fit the checkpoint"):
        train(tmp_path / "parts", *flags, "--image_size", 64)


@pytest.mark.parametrize("script", ["deepercluster", "deepcluster"])
def test_an_unreadable_image_is_told_and_in_no_cluster(images, tmp_path, script, capsys):
    data = shutil.copytree(images, tmp_path / "images")
    torn = next(data.rglob("*.png"))
    torn.write_bytes(torn.read_bytes()[:40])
    if script == "deepercluster":
        train(tmp_path / "run", "--data_path", data, "--epochs", 1)
    else:
        flags = [*deepcluster_tiny.FLAGS.split(), "--exp", str(tmp_path / "run"), "--epochs", "1", str(data)]
        deepcluster.main.train_deepcluster(deepcluster.main.parse_args(flags))
    listed = tmp_path / "run/bad_images.txt"
    assert f"in whose places others were read: 1, see {listed}" in capsys.readouterr().out
    with open(tmp_path / "run/clusters.csv") as file:
        clusters = {row["image"]: int(row["cluster"]) for row in csv.DictReader(file)}
    assert [image for image, number in clusters.items() if number < 0] == [str(torn)]


@pytest.mark.parametrize(
    "flags",
    ["--super_classes 4 --k 1", "--super_classes 1 --k 4 --rotnet 0", "--rules released --super_classes 4 --k 3"],
)
def test_variants_train(images, tmp_path, flags):
    found = train(tmp_path, "--data_path", images, *flags.split(), "--niter", 2, "--log_freq", 1)
    assert len(losses(tmp_path)) >= 2 and all(map(np.isfinite, losses(tmp_path)))
    assert ("--k 1" in flags) != any("clusters" in line for line in found)


def test_the_loss_of_both_levels_is_that_of_a_slow_loop():
    torch.manual_seed(0)
    of_super, of_sub = torch.randn(5, 8), torch.randn(5, 3)
    clusters = Clusters(torch.tensor([1, 1, 0, 1, 1, 1]), torch.tensor([0, 2, 1, 1, 0, 2]), 2, 3)
    place, images = Layout(1, 8, True).place(6), torch.tensor([5, 0, 2, 3, 1])  # image 2 is of another super-cluster
    found = hierarchical_loss(of_super, of_sub, place, clusters, images)
    supers = [-float(row.log_softmax(0)[6]) for row in of_super]
    subs = [-float(of_sub[i].log_softmax(0)[k]) for i, k in ((0, 2), (1, 0), (3, 1), (4, 2))]
    assert float(found["loss"]) == pytest.approx(sum(supers) / 5 + sum(subs) / 4, rel=1e-5)
    both = [
        int(of_super[i].argmax()) == 6 and int(of_sub[i].argmax()) == k for i, k in ((0, 2), (1, 0), (3, 1), (4, 2))
    ]
    assert float(found["prec"]) == pytest.approx(100 * sum(both) / 5)


# --- Official files ---------------------------------------------------------------------------------------------------


def official_files(folder, super_classes: int = 4):
    """A random checkpoint of a run that is to go on with its third epoch."""
    torch.manual_seed(0)
    network, scores = VGG16(**BODY), nn.Linear(128, super_classes)
    optimizers = []
    for module in (network, scores):
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizers.append(torch.optim.SGD(parameters, 0.1, 0.9))
        sum(p.square().sum() for p in parameters).backward()
        optimizers[-1].step()
    state = {"epoch": 2, "start_iter": 0, "optimizer": optimizers[0].state_dict()}
    state["state_dict"] = {f"module.{name}": value for name, value in network.state_dict().items()}
    state["pred_layer_state_dict"] = {f"module.{name}": value for name, value in scores.state_dict().items()}
    folder.mkdir(exist_ok=True)
    torch.save(state | {"optimizer_pred_layer": optimizers[1].state_dict()}, folder / "checkpoint.pth.tar")
    return network.eval(), scores, state


def test_a_run_of_the_official_code_goes_on(images, tmp_path, capsys):
    _, scores, state = official_files(tmp_path / "run")
    official = from_official(state)
    assert torch.equal(official["clustering"]["pred_layer_state_dict"]["weight"], scores.weight)
    assert official["epoch"] == 2 and official["step_in_epoch"] == 0
    found = train(tmp_path / "run", "--data_path", images, *"--super_classes 4 --k 3 --epochs 3 --lr 0.001".split())
    assert "an official checkpoint: clusters are found anew" in capsys.readouterr().out
    assert {line["epoch"] for line in found if "loss" in line} == {2}
    kept = state_of(tmp_path / "run")["pred_layer_state_dict"]["weight"]
    assert 0 < (kept - scores.weight).abs().max() < 0.02  # they went on from there


def test_networks_of_every_layout_load(tmp_path):
    network, _, state = official_files(tmp_path / "run")
    images = torch.randn(2, 3, 32, 32)
    body = {f"module.{name}": value for name, value in network.state_dict().items() if name.startswith("body.")}
    v1 = {name.removeprefix("module.body."): value for name, value in body.items()}
    v1 = {name.replace("features.", "features.module."): value for name, value in v1.items()}
    v1 |= {"top_layer.weight": torch.zeros(7, 128), "top_layer.bias": torch.zeros(7), "sobel.0.bias": torch.zeros(1)}
    layouts = {"official": state, "body": {"state_dict": body}, "deepcluster": {"arch": "vgg16", "state_dict": v1}}
    for name, contents in layouts.items():
        torch.save(contents, tmp_path / f"{name}.pth")
        found = load_network(tmp_path / f"{name}.pth")
        torch.testing.assert_close(found(images), network(images), rtol=0, atol=0)
    v1.pop("classifier.3.bias")
    torch.save({"state_dict": v1}, tmp_path / "torn.pth")
    with pytest.raises(ValueError, match=r"body.classifier.3.bias"):
        load_network(tmp_path / "torn.pth")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3, 3, 3, 3)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"no VGG16 of DeeperCluster or DeepCluster"):
        load_network(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--image_size 64", "another --image_size: maps of 1 x 1, not 2 x 2"),
        ("--width 4", "another --width: 2, not 4"),
        ("--sobel 0", "another --sobel: True, not False"),
    ],
)
def test_weights_of_another_network_are_refused_by_name(images, tmp_path, flags, message):
    official_files(tmp_path / "run")
    weights = tmp_path / "run/checkpoint.pth.tar"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "new", "--data_path", images, "--pretrained", weights, *flags.split())


def test_a_run_from_weights_is_compared_with_them(images, tmp_path, capsys):
    official_files(tmp_path / "run")
    weights = ("--pretrained", tmp_path / "run/checkpoint.pth.tar", "--super_classes", 4, "--k", 3)
    train(tmp_path / "new", "--data_path", images, *weights, "--epochs", 1, "--eval_knn_freq", 1)
    printed = capsys.readouterr().out
    assert printed.count("with the weights of --pretrained") >= 3 and "random weights" not in printed


# --- Zips -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def zips(images, tmp_path):
    """24 images in two zip files, and their numbers."""
    files = sorted(images.rglob("*.png"))
    numbers = [12_345_000 + i if i < 12 else 98_001_000 + i for i in range(len(files))]
    for number, file in zip(numbers, files, strict=True):
        text = f"{number:08d}"
        path = tmp_path / "zips" / text[:2] / f"{text[2:5]}.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "a") as archive:
            archive.write(file, f"{text[5:]}.jpg")
    np.save(tmp_path / "ids.npy", np.array(numbers))
    return tmp_path / "zips", tmp_path / "ids.npy", files, numbers


def test_images_in_zips_are_those_of_their_numbers(zips, tmp_path):
    root, ids, files, _ = zips
    source = ZippedImages(root, ids)
    assert len(source) == len(files) and len(ZippedImages(root, ids, most=5)) == 5
    for i in (0, 11, 12, 23):
        assert np.array_equal(source.load(i).decode(), read_image(files[i]).decode())
    assert source.path(0).endswith("12/345.zip/000.jpg")
    train(tmp_path / "run", "--data_path", root, "--image_ids", ids, "--workers", 2, "--super_classes", 4, "--k", 3)
    assert len(losses(tmp_path / "run")) == 6


def test_zips_that_do_not_hold_what_they_should_are_named(zips, tmp_path):
    root, ids, _, numbers = zips

    def refused(message):
        with pytest.raises(ValueError, match=message):
            ZippedImages(root, ids)

    np.save(ids, np.array([*numbers, 12_345_999]))
    refused(r"--image_ids .*: image 12345999 is not in .*12/345.zip, which has no 999.jpg")
    np.save(ids, np.array([*numbers, 77_000_000]))
    refused(r"77/000.zip cannot be read: No such file")
    np.save(ids, np.array([-1]))
    refused("-1 is no image number")
    np.save(ids, np.array(["a"]))
    refused("expected a list of integers")
    np.save(ids, np.array(numbers))
    path = root / "12/345.zip"
    path.write_bytes(path.read_bytes()[:-30])
    refused(r"12/345.zip cannot be read: File is not a zip file")


# --- Flags ------------------------------------------------------------------------------------------------------------


def test_published_commands_are_understood():
    official = (
        "--dump_path exp --pretrained WEIGHTS --data_path IMAGES --size_dataset 100000000 --workers 10 --sobel true "
        "--lr 0.1 --wd 0.00001 --nepochs 100 --batch_size 48 --reassignment 3 --dim_pca 4096 --super_classes 16 "
        "--rotnet true --k 320000 --warm_restart False --use_faiss true --niter 10 --world-size 64 --dist-url tcp://a:1"
    )
    args = parse_args(official.split())
    assert (args.k, args.super_classes, args.sobel, args.dist_url) == (320_000, 16, True, "tcp://a:1")
    assert parse_args([*FLAGS.split(), "--data_path", "x", "--world_size", "1", "--dist_url", ""]).dist_url == "env://"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--k 7 --super_classes 8", "--k 7 is not divisible by the 2 super-clusters of --super_classes"),
        ("--image_size 20", "--image_size 20 is less than 30"),
    ],
)
def test_flags_that_make_no_sense_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--data_path", "digits", *flags.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dim_pca 25", "--dim_pca 25: there are 24 images; take --dim_pca 24"),
        ("--k 50 --dim_pca 25", "--k 50, --dim_pca 25: there are 24 images; take --k 2, --dim_pca 24"),
        ("--batch_size 9", "--batch_size 9: an epoch shows each of 8 super-classes 3 of 24 images"),
        ("--super_classes 6", "--super_classes 6: with --rotnet it is four times"),
        ("--size_dataset 10 --batch_size 3", "--batch_size 3: an epoch shows"),
    ],
)
def test_flags_that_do_not_fit_the_images_are_named(flags, message, images, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, "--data_path", images, *flags.split())
