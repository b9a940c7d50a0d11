"""Linear, supervised and VOC evaluations of a small network, export, and the report's lists and folders."""

import csv
import itertools
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import vgg16_bn

from deepercluster import eval_linear, eval_pretrain, eval_voc_classif
from deepercluster.clustering import Clusters, Layout
from deepercluster.eval_linear import pooled
from deepercluster.export import before, export, get_args_parser, torchvision_vgg
from deepercluster.hub import load_network
from deepercluster.report import chance, members, save_clusters, save_folders, save_sub_clusters
from deepercluster.vgg16 import VGG16, fold_sobel, map_side, without_sobel
from shared.evaluation import voc as voc_evaluation
from shared.evaluation.partitions import describe_partition
from shared.images.sources import open_source
from tests.deepcluster.test_eval_voc_classif import write_voc
from tests.deepercluster.tiny import BODY
from tests.pictures import picture, write_image, write_train_and_val


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write_train_and_val(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"), sobel=True)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"), sobel=False)


def write_weights(folder, sobel: bool):
    """A file of the official layout, of a network for images of 32 pixels."""
    torch.manual_seed(0)
    path = folder / "checkpoint.pth.tar"
    network = VGG16(**{**BODY, "width": 8, "sobel": sobel})
    torch.save({"state_dict": {f"module.{n}": v for n, v in network.state_dict().items()}}, path)
    return path


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """Images of a colour each, the same in every split."""
    folder = write_voc(tmp_path_factory.mktemp("voc"))
    for i, colour in enumerate(itertools.product((30, 220), (30, 120, 220), (60,))):
        write_image(folder / "JPEGImages" / f"{i:06d}.jpg", picture(i, colour, 56, 64))
    return folder


COMMON = "--workers 0 --device cpu --nepochs 2 --batch_size 6".split()


def flags(labelled, weights, output_dir, *more):
    paths = ["--data_path", labelled, "--pretrained", weights, "--dump_path", output_dir]
    return [*map(str, (*paths, *COMMON, *more))]


# --- Network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [30, 32, 48, 64, 100, 224])
def test_sides_of_maps_are_those_of_a_forward_pass(size):
    with torch.device("meta"):
        network = VGG16(sobel=True, width=1, img_size=size)
        assert network(torch.zeros(2, 3, size, size)).shape == (2, 64)
        assert network.maps(torch.zeros(2, 3, size, size)).shape[-1] // 2 == map_side(size) == network.last_side
        assert pooled(network.maps(torch.zeros(2, 3, size, size), 13), 13).shape[-1] <= (4 if size == 224 else 7)
    if size < 62:  # else other maps
        with pytest.raises(ValueError, match=f"images of 64 x 64 .* takes {map_side(size)} x {map_side(size)}"):
            network(torch.zeros(2, 3, 64, 64, device="meta"))


@torch.no_grad()
def test_a_folded_network_sees_colours_and_computes_the_same_but_at_the_border():
    torch.manual_seed(0)
    network, images = VGG16(**BODY).eval(), torch.randn(2, 3, 32, 32)
    edges = network.maps(images, 1)
    folded = without_sobel(VGG16(**BODY).eval())
    folded.body.features[0] = fold_sobel(network.sobel, network.body.features[0])
    inner = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(folded.maps(images, 1)[inner], edges[inner], rtol=1e-4, atol=1e-5)
    assert folded.sobel is None and folded.maps(images, 1).shape == edges.shape


@pytest.mark.parametrize(("sobel", "folds"), [(False, False), (True, False), (True, True)])
@torch.no_grad()
def test_torchvisions_vgg_computes_the_same(sobel, folds):
    torch.manual_seed(0)
    network = VGG16(sobel=sobel, width=1, img_size=32).eval()
    network = without_sobel(network) if folds else network
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torchvision_vgg(network)(before(network, images)), network(images))
    with torch.device("meta"):
        names = {name for name in vgg16_bn(init_weights=False).state_dict() if not name.startswith("classifier.6")}
    assert names == set(torchvision_vgg(network).state_dict())


@pytest.mark.parametrize("fold", [[], ["--fold"]])
def test_exported_files_are_those_of_the_network(weights, tmp_path, fold):
    paths = ["--pretrained", str(weights), "--output_dir", str(tmp_path)]
    files = export(get_args_parser().parse_args([*paths, *fold]))
    state = torch.load(files["torchvision"], weights_only=True)
    expected = load_network(weights)
    first = fold_sobel(expected.sobel, expected.body.features[0]).weight if fold else expected.body.features[0].weight
    torch.testing.assert_close(state["features.0.weight"], first.data)
    assert torch.equal(state["classifier.3.weight"], expected.body.classifier[3].weight)
    assert {"safetensors", "onnx"} <= files.keys()


# --- Evaluations ------------------------------------------------------------------------------------------------------


def test_a_probe_learns_and_resumes(labelled, colours, tmp_path):
    result = eval_linear.eval_linear(
        eval_linear.parse_args(flags(labelled, colours, tmp_path, "--conv", 4, "--nepochs", 6, "--lr", 0.02))
    )
    assert result["acc1"] > 60  # three classes
    state = torch.load(tmp_path / "linear_conv4.pth.tar", weights_only=True)
    assert state["epoch"] == 6 and set(state["state_dict"]) == {"linear.weight", "linear.bias"}
    again = eval_linear.eval_linear(
        eval_linear.parse_args(flags(labelled, colours, tmp_path, "--conv", 4, "--nepochs", 6, "--lr", 0.02))
    )
    assert again["acc1"] == result["acc1"]
    with pytest.raises(ValueError, match="--sobel True: the network of --pretrained"):
        eval_linear.eval_linear(eval_linear.parse_args(flags(labelled, colours, tmp_path, "--sobel", 1)))


def test_a_part_of_the_training_images_is_classified_and_the_others_are_learnt_from(
    labelled, colours, tmp_path, monkeypatch
):
    training, parts = eval_linear.frozen.LabelledTraining, []

    def record(args, card, probe, features, sources, *more):
        parts.extend([source.path(i).rsplit("/", 1)[1] for i in range(len(source))] for source in sources)
        return training(args, card, probe, features, sources, *more)

    monkeypatch.setattr(eval_linear.frozen, "LabelledTraining", record)
    folds = flags(labelled, colours, tmp_path / "fold", "--conv", 13, "--kfold", 3, "--cross_valid", 1)
    eval_linear.eval_linear(eval_linear.parse_args(folds))
    assert parts == [3 * ["000.png", "001.png", "004.png", "005.png"], 3 * ["002.png", "003.png"]]  # of every class
    with pytest.raises(ValueError, match="--kfold 9: a class has 6 images"):
        wrong = flags(labelled, colours, tmp_path / "few", "--kfold", 9, "--cross_valid", 1)
        eval_linear.eval_linear(eval_linear.parse_args(wrong))


def test_the_rate_of_a_probe_falls_by_steps():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.5, weight_decay=0.1)

    class Crops:
        loader = range(3)

        def __call__(self, epoch):
            return iter(range(3))

    rates = [optimizer.param_groups[0]["lr"] for _ in eval_linear.decaying(Crops(), 2, optimizer, 0.5)]
    assert rates == pytest.approx([0.5 / (1 + 0.05 * step) ** 0.5 for step in (6, 7, 8)])


@pytest.mark.parametrize("more", [("--sobel2RGB", 1), ()])
def test_supervised_training_from_weights_and_its_evaluation(labelled, weights, tmp_path, more):
    result = eval_pretrain.eval_pretrain(eval_pretrain.parse_args(flags(labelled, weights, tmp_path, *more)))
    trained = tmp_path / "checkpoint.pth.tar"
    network = load_network(trained, relu=True, classifier=True)
    assert (network.sobel is None) == bool(more) and network.pred_layer.out_features == 3
    again = flags(labelled, trained, tmp_path, "--evaluate", 1, "--image_size", 32)
    assert eval_pretrain.eval_pretrain(eval_pretrain.parse_args(again))["acc1"] == result["acc1"]


def test_supervised_training_from_scratch(labelled, tmp_path):
    small = ("--width", 2, "--image_size", 32, "--debug", 1)
    args = eval_pretrain.parse_args(flags(labelled, "", tmp_path, *small))
    network, _ = eval_pretrain.open_network(args)
    linear = network.body.classifier[3]
    assert linear.bias[0].item() == pytest.approx(0.1) and linear.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert network.body.classifier[4].inplace and network.sobel is None
    eval_pretrain.eval_pretrain(args)
    with pytest.raises(ValueError, match=r"--lr 0\.5 does not fit"):
        eval_pretrain.eval_pretrain(eval_pretrain.parse_args(flags(labelled, "", tmp_path, *small, "--lr", 0.5)))


def test_voc_by_a_probe_and_by_training(voc, colours, tmp_path, monkeypatch):
    monkeypatch.chdir(voc.parent)  # named from inside of VOCdevkit, it was read as folders of classes
    probe = ("--split", "trainval", "--conv", 4, "--nepochs", 20, "--lr", 0.1)
    for path in ("VOC2007", "../VOCdevkit/VOC2007"):
        result = eval_linear.eval_linear(eval_linear.parse_args(flags(path, colours, tmp_path, *probe)))
        assert result["mAP"] > 90  # in a random order 45
    parser = eval_voc_classif.get_args_parser()
    few = "--nit 100 --workers 0 --device cpu --on_bad_image error --fc6_8 false".split()
    args = parser.parse_args(["--data_path", "VOC2007", "--pretrained", str(colours), *few])
    result = eval_voc_classif.eval_voc_classif(args)
    assert result.keys() == {"train", "val"} and result["val"] > 65


def test_a_test_image_that_cannot_be_read_has_no_scores_instead_of_those_of_another(
    voc, colours, tmp_path, monkeypatch
):
    folder = shutil.copytree(voc, tmp_path / "VOCdevkit" / "VOC2007")
    (folder / "JPEGImages" / "000002.jpg").write_bytes(b"broken")
    seen, precisions = [], voc_evaluation.average_precisions

    def see(scores, labels):
        seen.append(scores)
        return precisions(scores, labels)

    monkeypatch.setattr(voc_evaluation, "average_precisions", see)
    probe = ("--split", "trainval", "--conv", 4, "--nepochs", 1, "--max_bad_fraction", 0.5)
    eval_linear.eval_linear(eval_linear.parse_args(flags(folder, colours, tmp_path / "out", *probe)))
    assert np.isnan(seen[0]).all(axis=1).nonzero()[0].tolist() == [2] and np.isnan(seen[0]).any(axis=1).sum() == 1


# --- Report -----------------------------------------------------------------------------------------------------------


def test_clusters_as_a_list_folders_and_sheets(images, tmp_path, drawn):
    source = open_source(str(images), "train")
    supers, subs = torch.arange(24) % 2, torch.arange(24) // 2 % 3
    subs[3] = -1
    clusters = Clusters(supers, subs, 2, 4)
    with open(save_clusters(source, clusters, tmp_path / "clusters.csv")) as file:
        rows = list(csv.DictReader(file))
    assert [int(row["sub_cluster"]) for row in rows] == subs.tolist()
    assert rows[5]["class"] == source.classes[source.label(5)]
    folder = save_folders(source, clusters, tmp_path / "clusters")
    save_folders(source, clusters, folder)  # again
    for i in range(24):
        name = f"super_{supers[i]:02}/sub_{subs[i]:04}/{i:06}_{source.path(i).rsplit('/', 1)[1]}"
        assert (folder / name).exists() == (i != 3)
    save_sub_clusters(source, clusters, 1, tmp_path / "sheet.png")
    assert len(drawn[-1].axes[0].images) == 11 and [len(m) for m in members(clusters, 1)] == [4, 4, 3]
    line = describe_partition(clusters.assignments(), 8, clusters.assignments(), source)
    assert line["clusters"] == 6 and line["empty_clusters"] == 2 and line["nmi_previous"] == pytest.approx(1)
    assert chance(Layout(1, 8, True), clusters) == pytest.approx(np.log(8) + np.log(4))
