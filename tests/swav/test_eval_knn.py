import re

import pytest
import torch
from PIL import Image
from torchvision import transforms

from shared.evaluation import frozen
from swav import eval_knn, main_swav
from swav.hub import CARD
from tests.dino.small_data import write_train_and_val
from tests.shared.photographs import photograph
from tests.swav.official_layouts import build_small, make_network, training_checkpoint

SMALL = ["--pretrained", "random", "--image_size", "32", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_train_and_val(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    build_small(monkeypatch)


def run(*flags):
    return eval_knn.eval_knn(eval_knn.parse_args([*SMALL, *map(str, flags)]))


def test_images_of_three_colours_are_told_apart(data, capsys):
    accuracies = run("--data_path", data, "--nb_knn", 1, 5)
    assert accuracies[1] == (100, 100)
    assert accuracies[5][0] > 80
    assert re.search(r"^1-NN classifier result: Top1: 100.00, Top5: 100.00$", capsys.readouterr().out, re.MULTILINE)


def test_features_are_those_of_the_trunk_before_the_head(data, tmp_path, monkeypatch):
    source = make_network()
    torch.save(training_checkpoint(source), tmp_path / "checkpoint.pth.tar")
    seen = []
    monkeypatch.setattr(frozen, "knn_accuracies", lambda *a, **_: seen.append(a) or {})
    run("--data_path", data, "--pretrained", tmp_path / "checkpoint.pth.tar", "--nb_knn", 1)
    train_features, train_labels, val_features, _, ks, temperature = seen[0]
    assert train_features.shape == (18, 256)
    assert val_features.shape == (9, 256)
    assert (ks, temperature) == ([1], 0.07)
    assert train_labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    torch.testing.assert_close(val_features.norm(dim=1), torch.ones(9))
    _, val = frozen.labelled_sources(str(data), None)
    dataset = frozen.EvalDataset(val, frozen.eval_transform(CARD, 32, source))
    expected = torch.nn.functional.normalize(source.forward_backbone(dataset[0][0][None]), dim=1)
    torch.testing.assert_close(val_features[:1], expected, rtol=1e-4, atol=1e-6)


def test_images_are_prepared_as_in_the_official_code():
    chain = transforms.Compose(
        [
            transforms.Resize(256),  # bilinear
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.228, 0.224, 0.225)),
        ]
    )
    pixels = photograph(0, 300, 400)
    ours = frozen.eval_transform(CARD, 224, make_network())(pixels)
    difference = (ours - chain(Image.fromarray(pixels))).abs()
    assert difference.mean() < 0.05 / (255 * 0.228)
    assert difference.max() < 2.5 / (255 * 0.224)  # rounding of the two passes


def test_without_a_data_path_the_embedded_digits_are_classified(capsys):
    accuracies = run("--arch", "resnet50", "--nb_knn", 5)
    assert "embedded digits (val): 359 images" in capsys.readouterr().out
    assert 30 < accuracies[5][0] < 100


def test_defaults_for_the_embedded_digits_are_those_of_the_training():
    defaults, training = eval_knn.parse_args([]), main_swav.EMBEDDED_DATA_DEFAULTS
    assert defaults.arch == training["arch"]
    assert defaults.image_size == training["size_crops"][0]
    assert defaults.pretrained == training["output_dir"] + "/checkpoint.pth.tar"
    assert eval_knn.parse_args(["--data_path", "images"]).pretrained == ""


def test_bad_input_is_one_clear_error(data, tmp_path):
    with pytest.raises(ValueError, match="--nb_knn 19 is more than the 18 images"):
        run("--data_path", data, "--nb_knn", 19)
    with pytest.raises(ValueError, match=r"--data_path .*nowhere: no such file or folder"):
        run("--data_path", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"--pretrained .*nowhere is neither a file nor a release"):
        run("--data_path", data, "--nb_knn", 1, "--pretrained", tmp_path / "nowhere")
