from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from shared.evaluation.knn_monitor import classify_pixels
from shared.evaluation.without_labels import BesidePixels, ImageAndCrop, MeasuresWithoutLabels, recall_at_1
from shared.images.loading import EvalTransform
from shared.images.sources import ArraySource
from shared.run.health import rank_me

PARTS = {"train": slice(30), "val": slice(30, 50)}
TRANSFORM = EvalTransform(36, 32, (0.5,) * 3, (0.25,) * 3)


def photographs(number=30, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (number, 5, 5, 3), dtype=np.uint8)
    return ArraySource("noise", pixels.repeat(12, axis=1).repeat(12, axis=2))


def measures(tmp_path, source=None, epochs=3, **flags):
    flags = {"data_path": None, "val_path": None, "allow_absolute_paths": False, "max_megapixels": 1} | flags
    args = SimpleNamespace(epochs=epochs, on_bad_image="replace", max_bad_fraction=0, **flags)
    run = SimpleNamespace(args=args, device=torch.device("cpu"), output_dir=tmp_path, stop_if_asked=lambda: None)
    return MeasuresWithoutLabels(run, TRANSFORM, source=source)


class Colours(nn.Module):
    """Mean colours of the quarters of an image: a crop has others than the whole."""

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def test_raw_pixels_are_classified_as_a_loop_over_centred_thumbnails_does():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 50)
    pixels = (40 * labels[:, None, None, None] + rng.integers(0, 130, (50, 32, 32, 3))).astype(np.uint8)
    train, val = (ArraySource(n, pixels[part], labels[part], list("abc")) for n, part in PARTS.items())
    thumbnails = pixels.reshape(50, 16, 2, 16, 2, 3).mean(axis=(2, 4)).reshape(50, -1)
    thumbnails -= thumbnails[PARTS["train"]].mean(axis=0)
    thumbnails /= np.linalg.norm(thumbnails, axis=1, keepdims=True)
    hits = 0
    for row, label in zip(thumbnails[PARTS["val"]], labels[PARTS["val"]], strict=True):
        votes, similar = np.zeros(3), thumbnails[PARTS["train"]] @ row
        for i in np.argsort(-similar)[:20]:
            votes[labels[PARTS["train"]][i]] += np.exp(similar[i] / 0.07)
        hits += votes.argmax() == label
    found = classify_pixels(train, val, torch.device("cpu"))
    assert 0 < hits < 20 and found == pytest.approx(100 * hits / 20)


def test_recall_equals_a_loop_and_is_that_of_a_guess_where_all_features_are_equal():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(40, 6, generator=generator)
    crops = whole + 0.8 * torch.randn(40, 6, generator=generator)
    hits = 0
    for i, crop in enumerate((crops - crops.mean(0)) / crops.std(0)):
        standardised = (whole - whole.mean(0)) / whole.std(0)
        cosine = [float(torch.cosine_similarity(crop, image, dim=0)) for image in standardised]
        hits += cosine.index(max(cosine)) == i
    assert 10 < hits < 40 and recall_at_1(crops, whole) == 100 * hits / 40
    assert recall_at_1(whole * 3, whole) == recall_at_1(whole + 100, whole) == 100
    assert recall_at_1(torch.ones(40, 6), torch.ones(40, 6)) == 100 / 40


def test_a_crop_is_a_mirrored_half_of_what_evaluations_see_and_always_the_same():
    rows, columns = np.mgrid[:120, :200]
    pixels = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)  # every pixel says where it is
    images = ImageAndCrop(ArraySource("places", pixels[None].repeat(50, axis=0)), TRANSFORM)
    corners = []
    for i in range(50):
        pair, _, index = images[i]
        whole, crop = (view[:2] * 0.25 + 0.5 for view in pair)
        assert index == i and torch.equal(images[i][0], pair)
        assert (
            (crop[0].diff(dim=0) >= 0).all() and (crop[1].diff(dim=1) <= 0).all() and (whole[1].diff(dim=1) >= 0).all()
        )
        low, high = (crop.flatten(1).aminmax(dim=1)[k] * 255 for k in range(2))
        assert ((high - low + 1) / (120 * 32 / 36)).prod() == pytest.approx(0.5, abs=0.04)
        seen = whole.flatten(1).aminmax(dim=1)
        assert (low > seen[0] * 255 - 4).all() and (high < seen[1] * 255 + 4).all()
        corners.append(tuple(low.round().int().tolist()))
    assert len(set(corners)) > 40


def test_measures_are_those_of_the_features_and_of_pixels_and_draw_no_random_numbers(tmp_path):
    source, network = photographs(), Colours().train()
    measured = measures(tmp_path, source)
    state = torch.get_rng_state()
    values = measured.run(-1, network)
    assert torch.equal(torch.get_rng_state(), state) and network.training
    whole, crops = (torch.stack([measured.images[i][0][k] for i in range(30)]) for k in range(2))
    assert values == {
        "recall_chance": 100 / 30,
        "recall_at_1": recall_at_1(network(crops), network(whole)),
        "rankme": pytest.approx(rank_me(network(whole)).item(), rel=1e-5),
        "pixels_recall_at_1": recall_at_1(*(nn.functional.avg_pool2d(x, 2).flatten(1) for x in (crops, whole))),
        "pixels_rankme": pytest.approx(rank_me(nn.functional.avg_pool2d(whole, 2).flatten(1)).item(), rel=1e-5),
    }
    assert measured.run(0, network) == {name: values[name] for name in ("recall_chance", "recall_at_1", "rankme")}
    assert BesidePixels(network)(whole[:3]).shape == (3, 12 + 3 * 256)


def test_images_are_held_out_where_there_are_others_than_those_of_the_training(tmp_path, capsys):
    for name in ("train/a", "val/a", "flat", "more"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 40), (50 * i, 9, 9)).save(tmp_path / name / f"{i}.png")
    for data, val, folder, is_held_out in (
        (tmp_path / "flat", None, "flat", False),
        (tmp_path / "flat", tmp_path / "more", "more", True),
        (tmp_path / "train", None, "val", True),
    ):
        measured = measures(tmp_path, data_path=str(data), val_path=val and str(val))
        assert measured.images.source.root == str(tmp_path / folder)
        assert ("held out" in capsys.readouterr().out) == is_held_out
