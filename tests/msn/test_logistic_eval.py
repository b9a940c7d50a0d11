"""Low-shot evaluation: lists in the official format, draws, the objective, and bad input."""

import numpy as np
import pytest
import torch

from msn.hub import load_pretrained
from msn.logistic_eval import (
    LastClassToken,
    LowShotClassifier,
    draw_per_class,
    labelled_splits,
    logistic_eval,
    parse_args,
    preprocess,
)
from shared.images.sources import open_source
from tests.msn.tiny import CHECKPOINT


def evaluate(run, images, *flags) -> dict[str, float]:
    network = ["--model-name", "deit_tiny", "--pretrained", str(run), "--fname", CHECKPOINT]
    data = ["--data_path", str(images), "--val_path", str(images), "--image_size", "32", "--num_workers", "0"]
    return logistic_eval(parse_args([*network, *data, "--lambd", "0.0025", "--device", "cpu", *map(str, flags)]))


def write_list(path, per_class: int, start: int = 0):
    """File names as in the official lists: the class, an underscore, a number."""
    names = [f"class{c}_{3 * i + c:02d}.png" for c in range(3) for i in range(start, start + per_class)]
    path.write_text("\n".join(names) + "\n")
    return path


def test_colours_are_told_apart_with_one_image_per_class_from_official_lists(run, images, tmp_path, capsys):
    lists = [write_list(tmp_path / f"{i}imgs.txt", 1, i) for i in range(3)]
    result = evaluate(run, images, "--subset-path", *lists)
    assert result["acc1"] > 50  # chance is 33
    printed = capsys.readouterr().out
    assert all(f"{path}: 3 images, train 100.000 %" in printed for path in lists)
    assert "over 3 split(s)" in printed


def test_draws_masks_and_elastic_net(run, images):
    result = evaluate(run, images, "--imgs_per_class", 5, "--splits", 2, "--mask", 0.5, "--penalty", "elastic-net")
    assert result["acc1"] > 50 and result["spread"] >= 0
    assert result == evaluate(
        run, images, "--imgs_per_class", 5, "--splits", 2, "--mask", 0.5, "--penalty", "elastic-net"
    )


def test_all_images_are_labelled_without_lists_and_draws(run, images):
    assert evaluate(run, images)["spread"] == 0


def test_features_are_kept_and_used_again(run, images, tmp_path, capsys):
    checkpoint = tmp_path / CHECKPOINT
    checkpoint.write_bytes((run / CHECKPOINT).read_bytes())
    listed = write_list(tmp_path / "list.txt", 2)
    first = evaluate(tmp_path, images, "--preload", "--subset_path", listed)
    files = sorted(path.name for path in tmp_path.glob("*-features-*"))
    assert files[1] == f"val-features-{CHECKPOINT}" and files[0].startswith("train-features-")
    checkpoint_features = torch.load(tmp_path / files[1], weights_only=True)
    assert checkpoint_features.keys() == {"embs", "labs", "images", "made_with"}
    assert evaluate(tmp_path, images, "--preload", "--subset_path", listed) == first
    assert "features from" in capsys.readouterr().out
    with pytest.raises(ValueError, match="made with other values of mask; remove it"):
        evaluate(tmp_path, images, "--preload", "--subset_path", listed, "--mask", "0.5")
    stale = checkpoint_features["made_with"] | {"weights": 1}
    torch.save(checkpoint_features | {"made_with": stale}, tmp_path / files[1])
    with pytest.raises(ValueError, match="made with other values of weights; remove it"):
        evaluate(tmp_path, images, "--preload", "--subset_path", listed)
    torch.save({"embs": torch.zeros(2, 3), "labs": torch.zeros(2)}, tmp_path / files[1])
    with pytest.raises(ValueError, match="holds the features of other images"):
        evaluate(tmp_path, images, "--preload", "--subset_path", listed)


def test_draws_are_a_function_of_seed_split_and_class(images):
    source = open_source(str(images), "all")
    drawn = [draw_per_class(source, 2, seed, split) for seed, split in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2]) and not np.array_equal(drawn[0], drawn[3])
    assert np.bincount(source.labels[drawn[0]]).tolist() == [2, 2, 2]


def test_a_list_without_images_of_a_class_is_refused(images, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("class0_00.png\nclass1_01.png\n")
    with pytest.raises(ValueError, match=f"--subset_path {path}: no image of 1 classes, such as class2"):
        labelled_splits(open_source(str(images), "all"), [str(path)], None, 1, 0)


def test_bad_flags_are_refused(run, images, tmp_path):
    for flags, message in (
        (("--imgs_per_class", 9), "--imgs_per_class 9: class class0 has only 8 images"),
        (("--mask", 0.99), "--mask 0.99"),
        (("--subset_path", tmp_path / "no.txt"), "no.txt cannot be read"),
        (("--pretrained", tmp_path / "no"), "neither a file nor a release"),
        (("--model-name", "deit_small", "--checkpoint_key", "encoder"), "deit_small contradicts the checkpoint"),
        (("--checkpoint_key", "teacher"), "--checkpoint_key teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(run, images, *flags)
    with pytest.raises(SystemExit):
        parse_args(["--lambd", "0"])
    with pytest.raises(SystemExit):
        parse_args(["--root-path", "/datasets"])


@pytest.mark.parametrize("penalty", ["l2", "elastic-net"])
@pytest.mark.parametrize("num_classes", [2, 10])
def test_the_classifier_ends_where_no_derivative_points_down(num_classes, penalty):
    """Of few images in many dimensions, where solvers are slow: derivatives at weights of 0 and at all others."""
    generator = torch.Generator().manual_seed(0)
    labels, lambd = torch.arange(50) % num_classes, 0.0025
    features = torch.randn(50, 96, generator=generator) + torch.randn(num_classes, 96, generator=generator)[labels]
    weights = LowShotClassifier(features, labels, lambd, penalty).weights
    prepared, one_hot = preprocess(features.double().numpy()), np.eye(num_classes)[labels]
    scores = np.exp(prepared @ weights)
    gradient = prepared.T @ (scores / scores.sum(axis=1, keepdims=True) - one_hot) + lambd * weights
    if penalty == "l2":
        np.testing.assert_allclose(gradient, 0, atol=1e-4)
        return
    zero = weights == 0
    assert 0.1 < zero.mean() < 0.9
    assert np.abs(gradient[zero]).max() <= 1.001 * lambd
    np.testing.assert_allclose(gradient[~zero], -lambd * np.sign(weights[~zero]), rtol=1e-3)


def test_features_are_class_tokens_before_the_final_norm(run):
    encoder = load_pretrained("deit_tiny", run, CHECKPOINT).encoder
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder.norm(LastClassToken(encoder)(images)), encoder(images))
