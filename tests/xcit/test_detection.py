"""Detection: COCO's layout, average precision from its definition, training, resuming, official trunks."""

import argparse
import json
import math
import random
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as run_lengths

from shared import distributed
from shared.images.decode import ImageError
from tests.command_lines import error_of
from tests.processes import run_processes
from tests.run_folders import lines, losses
from tests.xcit.tiny import shrink_networks
from xcit import dense_training
from xcit.cross_covariance_transformer import build_xcit
from xcit.detection import main
from xcit.detection.average_precision import as_detections, average_precision
from xcit.detection.coco import CocoDataset, flip, random_crop, read_annotations, read_mask
from xcit.feature_pyramid import build_pyramid, fill_trunk
from xcit.prediction_pictures import color_of, paint_objects
from xcit.shapes import write_coco

TINY = (
    "--model xcit_nano_12_p8 --batch-size 2 --epochs 2 --min-size 32 --max-size 32 --no-crop --warmup-iters 0 "
    "--num_workers 0 --log_freq 1 --device cpu --saveckp_steps 1 --lr 1e-3 --steps 1 --rois-per-image 8"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"), {"train": 4, "val": 2})


def train(data, output_dir, *flags) -> list[dict]:
    arguments = [*TINY, "--data-path", str(data), "--output_dir", str(output_dir), *map(str, flags)]
    main.train_detector(main.parse_args(arguments))
    return lines(output_dir)


# --- Average precision ------------------------------------------------------------------------------------------------


THRESHOLDS, RECALLS = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)
SIDE = 24


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Of two masks of 0 and 1."""
    return (one & other).sum() / (one | other).sum()


def slow_ap(images: list, threshold: float) -> float:
    """One class, from the definition: (scores, masks found, masks of objects) per image."""
    detections = []
    for scores, found, objects in images:
        free = set(range(len(objects)))
        for d in np.argsort(-scores):
            best = max(free, key=lambda g: iou(found[d], objects[g]), default=None)
            hit = best is not None and iou(found[d], objects[best]) >= threshold
            free -= {best} if hit else set()
            detections.append((scores[d], hit))
    total = sum(len(objects) for *_, objects in images)
    points, hits = [], 0
    for count, (_, hit) in enumerate(sorted(detections, key=lambda detection: -detection[0]), start=1):
        hits += hit
        points.append((hits / total, hits / count))
    return np.mean([max((p for r, p in points if r >= recall), default=0.0) for recall in RECALLS])


def rectangles(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (K, 4) as left, top, right, bottom, near one of four places, and their masks (K, SIDE, SIDE)."""
    corners = rng.integers(0, 4, (count, 2)) * 6 + rng.integers(0, 2, (count, 2))
    boxes = np.concatenate([corners, corners + rng.integers(4, 7, (count, 2))], axis=1).clip(0, SIDE)
    masks = np.zeros((count, SIDE, SIDE), dtype=np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return boxes.astype(np.float32), masks


def coco_objects(image_id: int, category_id: int, boxes: np.ndarray, crowd: bool = False) -> list[dict]:
    return [
        {
            "id": 10_000 * image_id + 100 * category_id + i,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": [left, top, right - left, bottom - top],
            "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
            "iscrowd": int(crowd),
        }
        for i, (left, top, right, bottom) in enumerate(boxes.tolist())
    ]


def predictions(boxes: np.ndarray, masks: np.ndarray, scores: np.ndarray, label: int) -> dict[str, torch.Tensor]:
    found = {"boxes": boxes, "masks": masks[:, None] * 0.8, "scores": scores, "labels": np.full(len(boxes), label)}
    return {name: torch.from_numpy(value) for name, value in found.items()}


def in_coco(images: int, annotations: list[dict]) -> dict:
    return {
        "images": [{"id": i, "height": SIDE, "width": SIDE} for i in range(1, images + 1)],
        "categories": [{"id": number, "name": str(number)} for number in (10, 30, 70)],  # nothing is of the last one
        "annotations": annotations,
    }


def test_average_precision_by_its_definition():
    rng = np.random.default_rng(0)
    annotations, detections, by_class = [], [], {1: [], 2: []}
    for image_id, (found, present) in enumerate([(16, 9), (14, 10), (0, 2)], start=1):
        for label, category_id in ((1, 10), (2, 30)):
            boxes, objects = rectangles(rng, present)
            found_boxes, masks = rectangles(rng, found)
            scores = rng.permutation(50)[:found] / 50 + image_id / 1000
            by_class[label].append((scores, masks, objects))
            annotations += coco_objects(image_id, category_id, boxes)
            detections += as_detections(predictions(found_boxes, masks, scores, label), image_id, [10, 30, 70])
    result = average_precision(in_coco(3, annotations), detections)
    expected = np.mean([[slow_ap(images, t) for t in THRESHOLDS] for images in by_class.values()], axis=0)
    assert 0 < expected[-1] < expected[0] < 1
    for kind in ("box", "mask"):  # the masks are the boxes
        assert result[f"{kind}_ap"] == pytest.approx(100 * expected.mean())
        assert (result[f"{kind}_ap50"], result[f"{kind}_ap75"]) == pytest.approx((100 * expected[0], 100 * expected[5]))
    from_zero = [annotation | {"id": i} for i, annotation in enumerate(annotations)]
    assert average_precision(in_coco(3, from_zero), detections) == result
    nothing = average_precision(in_coco(3, annotations), [])
    assert set(nothing.values()) == {0.0}


def test_detections_in_a_crowd_do_not_count():
    boxes = np.array([[2, 2, 8, 8], [10, 10, 20, 20]], dtype=np.float32)
    masks = np.zeros((2, SIDE, SIDE), dtype=np.uint8)
    masks[0, 2:8, 2:8] = masks[1, 10:20, 10:20] = 1
    found = as_detections(predictions(boxes, masks, np.array([0.5, 0.9]), 1), 1, [10])
    crowd = coco_objects(1, 30, boxes[1:], crowd=True)
    objects = coco_objects(1, 10, boxes[:1])
    assert average_precision(in_coco(1, objects), found)["box_ap"] == pytest.approx(50.0)  # the better one is wrong
    crowd[0]["category_id"] = 10
    runs = [10 * SIDE + 10, *[10, SIDE - 10] * 9, 10]  # down the columns
    crowd[0]["segmentation"] = {"size": [SIDE, SIDE], "counts": [*runs, SIDE**2 - sum(runs)]}
    assert average_precision(in_coco(1, objects + crowd), found)["box_ap"] == pytest.approx(100.0)
    with pytest.raises(ValueError, match="there are no objects to detect in the val part"):
        average_precision(in_coco(1, crowd), found)


# --- Data -------------------------------------------------------------------------------------------------------------


def test_masks_from_polygons_and_from_runs():
    expected = np.zeros((6, 8), dtype=np.uint8)
    expected[1:4, 2:6] = 1
    assert np.array_equal(read_mask([[2, 1, 6, 1, 6, 4, 2, 4]], 6, 8), expected)
    halves = [[2, 1, 4, 1, 4, 4, 2, 4], [4, 1, 6, 1, 6, 4, 4, 4]]
    assert np.array_equal(read_mask(halves, 6, 8), expected)
    runs = [2 * 6 + 1, 3, 3, 3, 3, 3, 3, 3, 2 * 6 + 2]
    assert np.array_equal(read_mask({"counts": runs, "size": [6, 8]}, 6, 8), expected)
    assert np.array_equal(read_mask(run_lengths.encode(np.asfortranarray(expected)), 6, 8), expected)


def test_boxes_enclose_their_masks_whatever_the_augmentation(data):
    dataset = CocoDataset(data, "train", crop=False)
    assert dataset.classes == ["disc", "square", "triangle"]
    for index in range(len(dataset)):
        for epoch in range(4):
            image, target, found = dataset[(epoch, index)]
            assert found == index and image.shape[1:] == target["masks"].shape[1:]
            for box, mask in zip(target["boxes"], target["masks"], strict=True):
                ys, xs = mask.nonzero(as_tuple=True)
                drawn = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
                assert (drawn - box).abs().max() <= 1.5
    again = dataset[(3, 1)]
    assert torch.equal(again[0], dataset[(3, 1)][0]) and torch.equal(again[1]["boxes"], dataset[(3, 1)][1]["boxes"])


def test_two_flips_are_none_and_crops_keep_objects():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    masks = np.zeros((1, 60, 80), dtype=np.uint8)
    masks[0, 10:40, 20:60] = 1
    target = {
        "boxes": np.array([[20, 10, 60, 40]], dtype=np.float32),
        "labels": np.array([1]),
        "masks": masks,
        "crowd": np.array([False]),
    }
    twice = flip(*flip(pixels, target))
    assert np.array_equal(twice[0], pixels) and np.array_equal(twice[1]["boxes"], target["boxes"])
    for seed in range(5):
        cropped, kept = random_crop(pixels, target, random.Random(seed))
        assert kept["masks"].shape[1:] == cropped.shape[:2]
        left, top, right, bottom = kept["boxes"][0].astype(int)
        assert kept["masks"][0].sum() == (right - left) * (bottom - top) > 0


@pytest.mark.parametrize("bbox", [[5, 5, 0.5, 0.5], [63.5, 5, 9, 9], [-9, 5, 9, 9]])
def test_objects_of_less_than_a_pixel_inside_the_image_count_in_evaluation_only(bbox, tmp_path):
    root = write_coco(tmp_path, {"train": 1})
    content = rewrite(root, lambda annotations: annotations.append(annotations[0] | {"id": 99, "bbox": bbox}))
    assert len(CocoDataset(root, "train").instances[0]) == len(content["annotations"]) - 1
    assert len(CocoDataset(root, "train", augment=False).instances[0]) == len(content["annotations"])


def test_points_and_lines_among_the_polygons_enclose_nothing(tmp_path):
    root = write_coco(tmp_path, {"train": 1})
    _, expected, _ = CocoDataset(root, "train")[0]
    rewrite(root, lambda annotations: annotations[0]["segmentation"].insert(0, [1, 1, 60, 60]))
    _, target, _ = CocoDataset(root, "train")[0]
    assert torch.equal(target["masks"], expected["masks"])


def rewrite(root, change) -> dict:
    """The content of the annotations of the train part after a change of them."""
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    change(content["annotations"])
    path.write_text(json.dumps(content))
    return content


def test_an_image_of_another_size_than_its_annotations_say_ends_the_run_in_one_line(tmp_path, capsys):
    """Whatever --on_bad_image says, and from a loader process."""
    root = write_coco(tmp_path, {"train": 2, "val": 1})
    for image in (root / "train2017").iterdir():
        Image.new("RGB", (50, 40)).save(image)
    with pytest.raises(SystemExit) as stopped, distributed.clean_exit():
        train(root, tmp_path / "run", "--num_workers", 1)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"error: .*00000\d\.png has 40 x 50 pixels, its annotations are for 64 x 64", error)


def with_outlines(segmentation: list | dict):
    """Replaces every segmentation of a file."""

    def replace(text: str) -> str:
        content = json.loads(text)
        for annotation in content["annotations"]:
            annotation["segmentation"] = segmentation
        return json.dumps(content)

    return replace


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], r"is damaged, or no JSON: .* line 1 column \d+"),
        (lambda text: text.replace("categories", "classes"), "is not in COCO's layout of instances: 'categories' is"),
        (lambda text: text.replace("file_name", "name"), "'file_name' is missing"),
        (lambda text: "[]", "is not in COCO's layout of instances"),
        (lambda text: text.replace('"image_id": 1', '"image_id": 7'), "annotation 1 has the image_id 7, which is not"),
        (lambda text: text.replace('"category_id": ', '"category_id": 5'), "has the category_id 5.*, which is not am"),
        (lambda text: text.replace('"bbox": [', '"bbox": [1, '), "the bbox of annotation 1 is .*, expected four num"),
        (lambda text: text.replace('"bbox": [', '"bbox": ["x", '), "the bbox of annotation 1 is .*, expected four"),
        (lambda text: text.replace('"id": 20', '"id": 10'), "two of the categories have the same id"),
        (lambda text: text.replace('"disc"', '"\udcff"'), "is damaged, or no JSON: 'utf-8' codec can't decode"),
        (with_outlines([]), "annotation 1 has no polygon"),
        (with_outlines([[1, 1, 9, 9]]), "annotation 1 has no polygon"),
        (with_outlines([[1, 1, 9, 1, 9, 9, 1]]), "annotation 1 has no polygon .* or an odd number in one"),
        (with_outlines({"size": [64, 64], "counts": [5, 3]}), "the runs of annotation 1 are not those of an image of"),
        (with_outlines({"size": [64, 64], "counts": [5, -3, 64 * 64 - 2]}), "the runs of annotation 1"),
    ],
)
def test_annotations_that_are_damaged_are_refused_by_name(damage, message, tmp_path):
    path = write_coco(tmp_path, {"train": 1}) / "annotations" / "instances_train2017.json"
    path.write_text(damage(path.read_text()), errors="surrogateescape")
    with pytest.raises(ValueError, match=message) as error:
        read_annotations(path)
    assert str(path) in str(error.value)


def test_changed_annotations_are_noticed_where_a_run_goes_on(tmp_path, capsys):
    root = write_coco(tmp_path, {"train": 1})
    before = CocoDataset(root, "train").annotations_checksum
    rewrite(root, lambda annotations: annotations[0].update(bbox=[1, 1, 20, 20]))
    now = CocoDataset(root, "train").annotations_checksum
    dense_training.check_annotations({"epoch": 1}, now, "same_data")  # of an older version
    with pytest.raises(ValueError, match=r"other annotations: .*--on_changed_run continue"):
        dense_training.check_annotations({"annotations": before}, now, "same_data")
    dense_training.check_annotations({"annotations": before}, now, "continue")
    assert "resuming with other annotations" in capsys.readouterr().out


# --- Trunk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xcit_nano_12_p16", "xcit_nano_12_p8"])
def test_a_classifier_fills_the_trunk(name, tmp_path, small_networks):
    classifier = build_xcit(name)
    torch.save({"model": classifier.state_dict()}, tmp_path / "weights.pth")
    pyramid = build_pyramid(name)
    fill_trunk(pyramid, str(tmp_path / "weights.pth"))
    for key, value in pyramid.state_dict().items():
        assert key.startswith("fpn") or torch.equal(value, classifier.state_dict()[key])
    features = pyramid.eval()(torch.randn(1, 3, 64, 96))
    assert [tuple(f.shape[2:]) for f in features.values()] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    with pytest.raises(ValueError, match="does not fill the trunk"):
        fill_trunk(build_pyramid("xcit_tiny_12_p16"), str(tmp_path / "weights.pth"))
    state = classifier.state_dict()
    for other, message in (
        ({"blocks.2.gamma1": torch.ones(32)}, r"does not fill the trunk: blocks\.2\.gamma1"),
        ({"blocks.0.gamma1": torch.full((32,), torch.nan)}, r"blocks\.0\.gamma1 holds values that are not finite"),
    ):
        torch.save({"model": state | other}, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=message):
            fill_trunk(pyramid, str(tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    "flags", ["--min-size 0", "--max-size 0", "--rois-per-image 0", "--weight-decay -1", "--warmup-iters -1"]
)
def test_sizes_and_rates_that_make_no_sense_are_refused(flags):
    flag, value = flags.replace("-", "_").replace("__", "--", 1).replace(" _", " -").split()
    assert f"{flag} {value}" in error_of(main.parse_args, *flags.split())


def test_the_rate_falls_after_every_step_in_whichever_order_they_are_given():
    args = main.parse_args([*TINY, "--steps", "3", "1", "--epochs", "4"])
    assert main.learning_rates(args, 1) == pytest.approx([1e-3, 1e-4, 1e-4, 1e-5])


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_heads(monkeypatch):
    """A narrow neck, few proposals: the detector's heads are torchvision's."""
    few = {"box_detections_per_img": 4}
    few |= {f"rpn_{when}_nms_top_n_{part}": 12 for when in ("pre", "post") for part in ("train", "test")}
    monkeypatch.setattr(main, "NECK_CHANNELS", 8)
    monkeypatch.setattr(main, "MaskRCNN", partial(main.MaskRCNN, **few))


@pytest.mark.slow
def test_training_and_evaluation(data, tmp_path, small_networks, small_heads, capsys):
    written = train(data, tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 4
    assert {"loss_mask", "loss_box_reg", "loss_objectness", "lr"} <= written[0].keys()
    assert written[0]["lr"] == pytest.approx(1e-3) and written[-2]["lr"] == pytest.approx(1e-4)  # --steps 1
    assert {"box_ap", "mask_ap", "box_ap50"} <= written[-1].keys()
    assert Image.open(tmp_path / "whole/pictures/predictions.png").size[0] > 400

    capsys.readouterr()
    train(data, tmp_path / "whole", "--eval")
    printed = capsys.readouterr().out
    assert f"box_ap {written[-1]['box_ap']:.2f}" in printed and "the training had" not in printed
    with pytest.raises(ValueError, match=r"--eval: .*checkpoint\.pth is not a file"):
        train(data, tmp_path / "empty", "--eval")
    before = (tmp_path / "whole/metrics.jsonl").read_text()
    train(data, tmp_path / "whole")  # is finished
    assert f"box_ap {written[-1]['box_ap']:.2f}" in capsys.readouterr().out
    assert (tmp_path / "whole/metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_mixed_precision(data, tmp_path, small_networks, small_heads):
    train(data, tmp_path, "--amp", "bf16", "--epochs", 1, "--steps")
    assert len(losses(tmp_path)) == 2 and all(map(math.isfinite, losses(tmp_path)))


def evaluate(rank: int, data) -> list[float]:
    shrink_networks()
    torch.manual_seed(0)
    detector = main.build_detector("xcit_nano_12_p8", 3, min_size=(32,), max_size=32)
    result = main.evaluate_detector(detector, CocoDataset(data, "val", augment=False), torch.device("cpu"))
    return list(result.values())


@pytest.mark.slow
def test_two_processes_find_what_one_finds(data, small_networks):
    alone = evaluate(0, data)
    assert run_processes(evaluate, 2, data) == [alone, alone]


@pytest.mark.slow
def test_shapes_are_learned(tmp_path):
    """The defaults without data, as in the README."""
    main.train_detector(main.parse_args(["--output_dir", str(tmp_path), "--device", "cpu"]))
    assert lines(tmp_path)[-1]["box_ap50"] > 20


def test_an_unreadable_image_of_the_evaluation_is_an_error_or_its_objects_do_not_count(data, tmp_path, small_networks):
    root = shutil.copytree(data, tmp_path / "coco")
    dataset = CocoDataset(root, "val", augment=False)
    Path(dataset.source.path(0)).write_bytes(b"")
    detector = main.build_detector("xcit_nano_12_p8", 3, min_size=(32,), max_size=32)
    with pytest.raises(ImageError, match=dataset.source.path(0)):
        main.evaluate_detector(detector, dataset, torch.device("cpu"))
    args = argparse.Namespace(on_bad_image="skip", max_bad_fraction=0.01)
    dataset.bad_images = dense_training.bad_val_images(args, dataset)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "average_precision", lambda annotations, _: seen.extend(annotations["annotations"]) or {})
        assert main.evaluate_detector(detector, dataset, torch.device("cpu")) == {"left_out": 1}
    assert {one["image_id"] for one in seen} == {*dataset.image_ids[1:]}


def test_objects_have_masks_boxes_and_names_and_uncertain_ones_are_left_out():
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, 0, 8:40, 8:56] = 0.9
    masks[1, 0, 50:60, 2:12] = 0.9
    found = {
        "boxes": torch.tensor([[4.0, 4.0, 60.0, 44.0], [1.0, 48.0, 14.0, 62.0]]),
        "labels": torch.tensor([2, 1]),
        "masks": masks,
        "scores": torch.tensor([0.9, 0.4]),
    }
    image = torch.zeros(3, 64, 64)
    painted = paint_objects(image, found, ["disc", "square"])
    inside = painted[30 * 4, 30 * 4].astype(int)
    assert np.abs(inside - np.array(color_of(1)) // 2).max() <= 1  # half of the class's colour on black
    assert tuple(painted[4 * 4, 30 * 4]) == color_of(1)  # the upper edge of the box
    assert not painted[46 * 4 :].any()  # nothing of the second object
    assert not np.array_equal(painted, paint_objects(image, found, ["disc", "circle"]))  # names are written

    certain = found | {"scores": torch.tensor([0.4, 0.4])}
    assert not paint_objects(image, certain, ["disc", "square"]).any()
