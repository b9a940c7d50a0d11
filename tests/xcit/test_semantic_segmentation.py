"""Segmentation: ADE20K's layout, mIoU, training, resuming."""

import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from shared import distributed
from shared.images.decode import ImageError
from shared.images.loading import BadImages
from tests.command_lines import error_of
from tests.processes import run_processes
from tests.reliability.runs import assert_same_run
from tests.run_folders import lines, losses, stopped_after
from tests.xcit.tiny import shrink_networks
from xcit.semantic_segmentation import main
from xcit.semantic_segmentation.ade20k import UNLABELLED, ADE20KDataset, augment
from xcit.shapes import write_ade20k

TINY = (
    "--model xcit_nano_12_p8 --num-classes 4 --batch-size 2 --iterations 3 --crop-size 32 --warmup-iters 1 "
    "--num_workers 0 --log_freq 1 --device cpu --saveckp_steps 1 --lr 1e-3"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_ade20k(tmp_path_factory.mktemp("ade"), {"training": 4, "validation": 2})


def train(data, output_dir, *flags) -> list[dict]:
    arguments = [*TINY, "--data-path", str(data), "--output_dir", str(output_dir), *map(str, flags)]
    main.train_segmenter(main.parse_args(arguments))
    return lines(output_dir)


def test_intersection_over_union_by_its_definition():
    generator = torch.Generator().manual_seed(0)
    labels, predicted = (torch.randint(0, 4, (200,), generator=generator) for _ in range(2))
    labels[:20] = UNLABELLED
    metrics = main.build_metrics(num_classes=6)
    for rows in (slice(0, 90), slice(90, 200)):  # two images
        metrics.update(predicted[None, rows], labels[None, rows])
    result = {name: 100 * value.item() for name, value in metrics.compute().items()}
    known = labels != UNLABELLED
    ious = []
    for c in range(4):  # classes 4 and 5 neither occur nor are predicted
        mine, truth = (predicted == c) & known, labels == c
        ious.append((mine & truth).sum() / (mine | truth).sum())
    assert result["miou"] == pytest.approx(100 * np.mean(ious), rel=1e-6)
    assert result["pixel_acc"] == pytest.approx(100 * (predicted == labels).sum().item() / 180)


def test_labels_are_numbered_from_zero_and_zero_is_no_class(data):
    dataset = ADE20KDataset(data, "validation", crop_px=32, augment=False)
    image, target, _ = dataset[0]
    assert image.shape == (3, 32, 32) and target["labels"].shape == (64, 64)
    assert (target["labels"][:2] == UNLABELLED).all()
    assert set(target["labels"][2:].unique().tolist()) <= {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (Image.new("L", (50, 40)), "000000.png has 40 x 50 pixels, its image 64 x 64"),
        (Image.new("RGB", (64, 64)), "000000.png has pixels of Pillow's mode RGB, expected 8 bits of grey"),
        (Image.new("I;16", (64, 64)), "000000.png has pixels of Pillow's mode I;16, expected"),
        (Image.new("L", (64, 64), 9), "000000.png has the class 9, there are 4 (--num-classes)"),
    ],
)
def test_label_maps_that_do_not_fit_end_the_run_in_one_line(labels, message, tmp_path, capsys):
    """Whatever --on_bad_image says, and from a loader process."""
    root = write_ade20k(tmp_path, {"training": 2, "validation": 1})
    labels.save(root / "annotations/training/000000.png")
    with pytest.raises(SystemExit) as stopped, distributed.clean_exit():
        train(root, tmp_path / "run", "--num_workers", 1)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_label_maps_may_have_a_palette_and_damaged_ones_follow_the_policy(tmp_path):
    root = write_ade20k(tmp_path, {"training": 2})
    dataset = ADE20KDataset(root, "training", augment=False)
    dataset.bad_images = BadImages(2)
    expected = [dataset[index][1]["labels"] for index in (0, 1)]
    path = root / "annotations/training/000000.png"
    labels = Image.open(path)
    labels.putpalette([200, 10, 10, 0, 180, 0, 0, 0, 170, 90, 90, 0, 5, 5, 5])
    labels.save(path)
    assert torch.equal(dataset[0][1]["labels"], expected[0])
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(dataset[0][1]["labels"], expected[1]) and dataset.bad_images.count() == 1


def test_pixels_and_labels_stay_together():
    labels = np.full((40, 50), 3, dtype=np.uint8)
    labels[10:30, 15:30] = 1
    pixels = np.where(labels[..., None] == 1, 220, 20).astype(np.uint8).repeat(3, axis=2)
    for seed in range(8):
        image, cropped = augment(pixels, labels, 64, random.Random(seed))
        assert image.shape == (64, 64, 3) and cropped.shape == (64, 64)
        bright, dark = image[cropped == 1], image[cropped == 3]
        if len(bright) and len(dark):
            assert np.median(bright) > np.median(dark)
    again = augment(pixels, labels, 64, random.Random(7))
    assert np.array_equal(again[0], image) and np.array_equal(again[1], cropped)


def test_missing_files_are_named(data, tmp_path):
    with pytest.raises(ValueError, match="no images in"):
        ADE20KDataset(tmp_path, "training")
    broken = write_ade20k(tmp_path / "broken", {"training": 2})
    (broken / "annotations/training/000001.png").unlink()
    with pytest.raises(ValueError, match=r"000001\.png is missing"):
        ADE20KDataset(broken, "training")


def test_training_evaluation_and_an_exact_resume(data, tmp_path, monkeypatch, small_networks, capsys):
    monkeypatch.setattr(main, "NECK_CHANNELS", 8)
    monkeypatch.setattr(main, "HEAD_CHANNELS", 8)
    written = train(data, tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 3
    rates = [line["lr"] for line in written if "lr" in line]
    assert rates == pytest.approx([1e-3 * 1e-6, 1e-3 * 2 / 3, 1e-3 / 3])  # linear to 0, one step of warm-up
    assert {"miou", "pixel_acc"} <= written[-1].keys()
    assert Image.open(tmp_path / "whole/pictures/predictions.png").size[0] > 400

    data = shutil.copytree(data, tmp_path / "data")
    with stopped_after(2):
        train(data, tmp_path / "stopped")
    label_map = data / "annotations/training/000000.png"
    written_before = label_map.read_bytes()
    Image.new("L", (64, 64), 1).save(label_map)
    with pytest.raises(ValueError, match="was written with other annotations"):
        train(data, tmp_path / "stopped")
    label_map.write_bytes(written_before)
    train(data, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")

    capsys.readouterr()
    train(data, tmp_path / "whole", "--eval")
    assert f"miou {written[-1]['miou']:.2f}" in capsys.readouterr().out
    train(data, tmp_path / "whole", "--eval", "--crop-size", 64)
    assert "--eval with --crop_size 64, the training had 32" in capsys.readouterr().out
    train(data, tmp_path / "whole")  # is finished
    assert f"miou {written[-1]['miou']:.2f}" in capsys.readouterr().out


def test_the_neck_has_the_published_width_and_crops_reach_the_coarsest_map():
    with torch.device("meta"):
        necks = [main.SemanticFPN(f"xcit_{name}_24_p16", 4).neck for name in ("small", "medium")]
    assert [neck.layer_blocks[0][0].out_channels for neck in necks] == [256, 512]
    assert "--crop_size 24 is less than 32" in error_of(main.parse_args, "--crop-size", "24")


def test_any_image_size_is_segmented(small_networks):
    network = main.SemanticFPN("xcit_nano_12_p16", 3).eval()
    with torch.no_grad():
        small, large = network([torch.rand(3, 35, 50), torch.rand(3, 64, 33)])
    assert (small.shape, large.shape) == ((3, 35, 50), (3, 64, 33))
    unlabelled = {"labels": torch.full((32, 32), UNLABELLED)}
    assert network.train()([torch.rand(3, 32, 32)] * 2, [unlabelled] * 2)["loss"] == 0


def evaluate(rank: int, data) -> list[float]:
    shrink_networks()
    torch.manual_seed(0)
    network = main.SemanticFPN("xcit_nano_12_p8", 4)
    dataset = ADE20KDataset(data, "validation", crop_px=32, augment=False)
    return list(main.evaluate_segmenter(network, dataset, torch.device("cpu"), 4).values())


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(data, small_networks):
    alone = evaluate(0, data)
    assert run_processes(evaluate, 2, data) == [alone, alone]


@pytest.mark.slow
def test_shapes_are_learned(tmp_path):
    """The defaults without data, as in the README."""
    main.train_segmenter(main.parse_args(["--output_dir", str(tmp_path), "--device", "cpu"]))
    assert lines(tmp_path)[-1]["miou"] > 30  # 37.8 when it was written; background alone is less than 25


def test_an_unreadable_image_of_the_evaluation_is_an_error_or_left_out(tmp_path, small_networks, capsys):
    root = write_ade20k(tmp_path, {"training": 2, "validation": 3})
    (root / "images/validation/000001.jpg").write_bytes(b"")
    with pytest.raises(ImageError, match=r"validation/000001\.jpg"):
        train(root, tmp_path / "run")
    written = train(root, tmp_path / "skipped", "--on_bad_image", "skip")[-1]
    printed = capsys.readouterr().out
    assert written["left_out"] == 1 and written["miou"] >= 0
    assert "1 of 3 images of" in printed and "left out\n" in printed and "left_out 1" in printed
