"""A classifier is evaluated on the classes that it was trained on, by their names and not by their order."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dino import eval_linear
from flexivit import eval_flexivit
from flexivit import main as flexivit
from navit import eval_resolutions
from shared.images.labelled import check_classes
from tests.flexivit import tiny as tiny_flexivit
from tests.msn.tiny import small_networks
from tests.navit import tiny as tiny_navit
from tests.pictures import write_image
from tests.xcit import tiny as tiny_xcit
from xcit import main as xcit

DEVICE = ("--device", "cpu", "--num_workers", "0")
NAMES = ("2", "10")  # numbers: folders have them in the order of strings, lists in that of integers


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Folders, lists of the same images, and the images under two other names, in parts train and val."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, number in (("train", 5), ("val", 3)):
        rows = []
        for i in range(2 * number - 1):  # an odd number: no classifier is as good as its contrary
            name = NAMES[i % 2]
            pixels = np.clip(rng.normal(60 + 120 * (i % 2), 30, size=(16, 16, 3)), 0, 255).astype(np.uint8)
            write_image(root / part / name / f"{i}.png", pixels)
            write_image(root / "other" / part / f"class{name}" / f"{i}.png", pixels)
            rows.append(f"{part}/{name}/{i}.png,{name}\n")
        (root / f"{part}.csv").write_text("".join(rows))
    return root


def train_and_test_flexivit(folder: Path, data: Path) -> Callable:
    tiny_flexivit.train(folder, "--data_path", data, "--epochs", 1)
    return lambda *images: eval_flexivit.eval_flexivit(
        eval_flexivit.parse_args(
            ["--pretrained", str(folder), *images, "--sizes", "8", "--output_dir", f"{folder}/cost", *DEVICE]
        )
    )[0]["acc1"]


def train_and_test_navit(folder: Path, data: Path) -> Callable:
    tiny_navit.train(folder, "--data_path", data, "--epochs", 1)
    file, out = str(folder / "checkpoint.pth"), f"{folder}/cost"
    return lambda *images: eval_resolutions.eval_resolutions(
        eval_resolutions.parse_args(["--pretrained", file, *images, "--resolutions", "8", "--output_dir", out, *DEVICE])
    )[0][0]["acc1"]


def train_and_test_xcit(folder: Path, data: Path) -> Callable:
    tiny_xcit.shrink_networks()
    tiny_xcit.train(folder, "--data_path", data, "--epochs", 1)

    def test(*images) -> float:
        arguments = [*tiny_xcit.FLAGS.split(), *images, "--eval", "--output_dir", str(folder)]
        found = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "shared.supervised.data.LabelledImages.print_accuracy",
                lambda images, network: found.append(images.evaluate(network)["acc1"]),
            )
            xcit.train_xcit(xcit.parse_args(arguments))
        return found[0]

    return test


def train_and_test_probe(folder: Path, data: Path) -> Callable:
    flags = ["--arch", "vit_micro", "--patch_size", "8", "--image_size", "16", "--pretrained_weights", "random"]
    flags += ["--num_labels", "2", "--epochs", "1", "--output_dir", str(folder), "--seed", "0", *DEVICE]
    with small_networks():
        eval_linear.eval_linear(eval_linear.parse_args([*flags, "--data_path", str(data), "--lr", "5"]))

    def test(*images) -> float:
        weights = ["--evaluate", "--linear_weights", str(folder / "checkpoint.pth.tar")]
        with small_networks():
            return eval_linear.eval_linear(eval_linear.parse_args([*flags, *images, *weights]))["acc1"]

    return test


METHODS = [train_and_test_flexivit, train_and_test_navit, train_and_test_xcit, train_and_test_probe]


@pytest.mark.parametrize("train_and_test", METHODS)
def test_other_orders_are_matched_and_other_classes_refused(train_and_test, data, tmp_path):
    test = train_and_test(tmp_path, data)
    accuracy = test("--data_path", str(data))
    listed = "--data_path", str(data / "train.csv"), "--val_path", str(data / "val.csv")
    assert test(*listed) == accuracy
    with pytest.raises(ValueError, match=r"other classes than those that the classifier .* missing 10, 2, additional"):
        test("--data_path", str(data / "other"))

    # a file that does not name them, as older ones, is taken at its word: the order of the list is another one
    file = next(f for f in tmp_path.glob("checkpoint.pth*") if f.suffix in (".pth", ".tar"))
    checkpoint = torch.load(file, weights_only=True)
    assert sorted(checkpoint.pop("classes")) == ["10", "2"]
    torch.save(checkpoint, file)
    assert test("--data_path", str(data / "other")) == accuracy
    assert test(*listed) == pytest.approx(100 - accuracy)


def test_a_teacher_of_other_classes_or_in_another_order_is_refused(data, tmp_path):
    tiny_flexivit.train(tmp_path / "teacher", "--data_path", data, "--epochs", 1)
    flags = [*tiny_flexivit.FLAGS.split(), "--teacher", str(tmp_path / "teacher"), "--output_dir", str(tmp_path)]
    listed = ["--data_path", str(data / "train.csv"), "--val_path", str(data / "val.csv")]
    with pytest.raises(ValueError, match="than those that --teacher was trained on: 2 against 2, the same in another"):
        flexivit.train_flexivit(flexivit.parse_args([*flags, *listed]))
    check_classes("--teacher", "", NAMES)  # one that does not say


def test_a_probe_does_not_go_on_with_other_images(data, tmp_path):
    """Its accuracy was that of the classifier of the first images, on the second ones."""
    flags = ["--arch", "vit_micro", "--patch_size", "8", "--image_size", "16", "--pretrained_weights", "random"]
    flags += ["--num_labels", "2", "--epochs", "1", "--output_dir", str(tmp_path), "--seed", "0", *DEVICE]
    with small_networks():
        eval_linear.eval_linear(eval_linear.parse_args([*flags, "--data_path", str(data)]))
        with pytest.raises(ValueError, match="has learned from other images than these; use another --output_dir"):
            eval_linear.eval_linear(eval_linear.parse_args([*flags, "--data_path", str(data / "other")]))
