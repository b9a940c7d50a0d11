"""VOC 2007 classification on a generated folder of the same layout."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from deepcluster.eval_voc_classif import eval_voc_classif, get_args_parser, start_classifier
from deepcluster.hub import build_network, load_network
from shared.evaluation.voc import CLASSES, VOCImages, average_precisions, multilabel_loss
from shared.images.decode import ImageError
from tests.deepcluster.tiny import write_checkpoint

# objects of an image: (class, is it difficult)
OBJECTS = [
    [("cat", 0)],
    [("cat", 1)],
    [("cat", 1), ("cat", 0), ("dog", 1)],
    [("dog", 0), ("person", 0)],
    [],
    [("tvmonitor", 0), ("aeroplane", 0)],
]


def write_voc(root, splits=("train", "val", "trainval", "test")):
    folder = root / "VOCdevkit" / "VOC2007"
    for name in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, objects in enumerate(OBJECTS):
        name = f"{i:06d}"
        pixels = rng.integers(0, 256, size=(50, 60 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
        things = "".join(
            f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox><xmin>1</xmin><ymin>1</ymin>"
            "<xmax>9</xmax><ymax>9</ymax></bndbox></object>"
            for label, difficult in objects
        )
        (folder / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><folder>VOC2007</folder><filename>{name}.jpg</filename>{things}</annotation>"
        )
    for split in splits:
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{i:06d}\n" for i in range(len(OBJECTS))))
    return folder


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc"))


def test_labels_tell_classes_that_are_shown_ignored_and_absent(voc):
    images = VOCImages(voc, "trainval")
    assert len(images.source) == len(OBJECTS) and images.labels.shape == (len(OBJECTS), 20)
    cat, dog = CLASSES.index("cat"), CLASSES.index("dog")
    assert images.labels[:, cat].tolist() == [1, 255, 1, 0, 0, 0]
    assert images.labels[:, dog].tolist() == [0, 0, 255, 1, 0, 0]
    assert (images.labels == 1).sum() == 6
    assert images.source.load(2).decode().shape == (50, 62, 3)


def test_another_layout_is_refused(voc, tmp_path):
    with pytest.raises(ValueError, match=r"--vocdir .*: expected a folder that ends in VOCdevkit/VOC2007"):
        VOCImages(tmp_path, "train")
    with pytest.raises(ValueError, match=r"has no ImageSets/Main/test.txt"):
        VOCImages(write_voc(tmp_path, splits=("train",)), "test")


def test_the_loss_leaves_ignored_classes_out():
    scores = torch.randn(4, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.randint(0, 2, (4, 20), generator=torch.Generator().manual_seed(1))
    labels[0, 3] = labels[2, 7] = 255
    expected = sum(
        (1 + (scores[i, c] if label == 0 else -scores[i, c]).exp()).log()
        for i in range(4)
        for c in range(20)
        if (label := int(labels[i, c])) != 255
    )
    loss = multilabel_loss(scores, labels)
    torch.testing.assert_close(loss, expected / 4)
    loss.backward()
    assert scores.grad[0, 3] == scores.grad[2, 7] == 0 and scores.grad[0, 4] != 0


@pytest.mark.parametrize(("freeze", "batchnorm"), [(True, False), (True, True), (False, False)])
def test_only_what_is_asked_for_learns(freeze, batchnorm, small_layers):
    network = build_network("alexnet", sobel=True, img_size=64)
    learning = {id(p) for p in start_classifier(network, freeze, batchnorm)}
    for module in network.features:
        expected = not freeze or (batchnorm and isinstance(module, nn.BatchNorm2d))
        assert all((id(p) in learning) == expected for p in module.parameters())
    for module in (*network.classifier, network.top_layer):
        assert all(id(p) in learning for p in module.parameters())
        if isinstance(module, nn.Linear):
            assert (module.bias == 0.1).all()
    assert not any(id(p) in learning for p in network.sobel.parameters())


def test_a_class_that_is_never_shown_has_no_precision():
    labels = np.array([[1, 0], [0, 0], [0, 255]])
    precisions = average_precisions(np.array([[3.0, 1], [2, 1], [1, 1]]), labels)
    assert precisions[0] == 1 and np.isnan(precisions[1])


def test_of_equal_scores_the_images_without_the_class_come_first():
    labels = np.array([[1], [0]])
    assert average_precisions(np.zeros((2, 1)), labels)[0] == pytest.approx(0.5)


@pytest.mark.parametrize("flags", ["--fc6_8 1 --train_batchnorm 1", "--fc6_8 0 --eval_random_crops 0"])
def test_the_classifier_learns_its_training_images(voc, tmp_path, small_layers, flags, capsys):
    model = write_checkpoint(tmp_path / "checkpoint.pth.tar")
    command = f"--vocdir {voc} --split trainval --model {model} --nit 12 --stepsize 5 --workers 0 --device cpu {flags}"
    results = eval_voc_classif(get_args_parser().parse_args(command.split()))
    assert results.keys() == {"trainval", "test"}
    assert 0 < results["test"] <= 100 and results["test"] == pytest.approx(results["trainval"])  # the same images
    printed = capsys.readouterr().out
    assert "step 12 of 12: loss" in printed and "test mAP: " in printed and "trainval cat: " in printed
    assert load_network(model).top_layer.out_features == 7  # the file is left alone


def test_a_training_that_diverges_is_an_error(voc, tmp_path, small_layers):
    model = write_checkpoint(tmp_path / "checkpoint.pth.tar")
    command = f"--vocdir {voc} --split trainval --model {model} --nit 2 --lr inf --workers 0 --device cpu"
    with pytest.raises(ValueError, match="up to step 2 the loss is nan, its gradient nan; try a smaller --lr"):
        eval_voc_classif(get_args_parser().parse_args(command.split()))


@pytest.mark.parametrize("random_crops", ["0", "1"])
def test_an_unreadable_image_is_an_error_or_has_no_score(random_crops, tmp_path, small_layers, capsys):
    folder, model = write_voc(tmp_path), write_checkpoint(tmp_path / "checkpoint.pth.tar")
    (folder / "JPEGImages/000003.jpg").write_bytes(b"")
    command = f"--vocdir {folder} --split trainval --model {model} --nit 2 --workers 0 --device cpu".split()
    command += ["--eval_random_crops", random_crops]
    with pytest.raises(ImageError, match=r"000003\.jpg"):
        eval_voc_classif(get_args_parser().parse_args(command))
    capsys.readouterr()
    eval_voc_classif(get_args_parser().parse_args([*command, "--on_bad_image", "skip"]))
    printed = capsys.readouterr().out
    assert printed.count(" (without 1 of 6 images)\n") == 2
    assert "test person: nan %" in printed and "test cat: nan" not in printed  # the only person was in it
