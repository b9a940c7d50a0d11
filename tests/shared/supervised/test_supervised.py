"""Supervised training's parts: draws by key, sampling, schedules, clipping, averages, accuracy, data sets."""

import argparse
import json
import math
import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from shared.images.inaturalist import open_inaturalist
from shared.images.loading import EvalDataset, EvalTransform
from shared.images.sources import ArraySource
from shared.networks.classifiers import build_library_classifier
from shared.optimisation.optim import clip_total_grad_norm_, step_unless_not_finite
from shared.optimisation.precision import Precision
from shared.run.checkpoint import restore
from shared.run.flags import AnyDashParser
from shared.supervised.data import LabelledViews, RepeatedAugmentationSampler, open_train_and_val
from shared.supervised.ema import NetworkEMA
from shared.supervised.evaluation import evaluate_classifier
from shared.supervised.losses import build_teacher
from shared.supervised.optimizer import (
    build_timm_optimizer,
    counters_of,
)
from shared.supervised.transforms import TrainTransform, posterize
from tests.processes import run_processes

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def source(count: int = 5, side: int = 40) -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return ArraySource("noise", pixels, np.arange(count) % 3, ["a", "b", "c"])


# --- Views ------------------------------------------------------------------------------------------------------------


def test_a_view_is_a_function_of_seed_epoch_index_and_repetition():
    views = LabelledViews(source(), TrainTransform(36, MEAN, STD), seed=3)
    for key in [(0, 1), (0, 1, 2), (1, 4)]:
        first, label, index = views[key]
        random.seed(7), np.random.seed(8), torch.manual_seed(9)
        again, _, _ = views[key]
        assert torch.equal(first, again) and (label, index) == (key[1] % 3, key[1])
    keys = [(0, 1), (1, 1), (0, 1, 0), (0, 1, 1)]
    drawn = [views[key][0] for key in keys] + [LabelledViews(source(), TrainTransform(36, MEAN, STD), seed=4)[0, 1][0]]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_without_augmentation_small_images_are_shifted_and_mirrored_only():
    transform = TrainTransform(8, MEAN, STD, auto_augment=None, color_jitter=0.0, erase_p=0.0)
    pixels = source(1, 8).pixels[0]
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0))).astype(np.float32) / 255
    normalized = (padded - np.float32(MEAN)) / np.float32(STD)
    crops = [normalized[i : i + 8, j : j + 8] for i in range(9) for j in range(9)]
    crops += [crop[:, ::-1] for crop in crops]
    for seed in range(5):
        random.seed(seed), torch.manual_seed(seed)
        view = transform(pixels).permute(1, 2, 0).numpy()
        assert min(np.abs(view - crop).max() for crop in crops) < 1e-5


# --- Repeated augmentation --------------------------------------------------------------------------------------------


def test_an_epoch_can_be_entered_anywhere_and_few_images_are_not_lost():
    sampler = RepeatedAugmentationSampler(20, 4, seed=1)
    sampler.set_epoch(3)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 5 and {len(batch) for batch in batches} == {4}
    sampler.set_epoch(3, start_step=3)
    assert list(sampler) == batches[3:]


# --- Optimiser and schedule -------------------------------------------------------------------------------------------


class WithToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 3))
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))
        self.linear = nn.Linear(3, 3)

    def no_weight_decay(self):
        return {"cls_token"}


def test_biases_vectors_and_named_tensors_are_not_decayed():
    network = WithToken()
    optimizer = build_timm_optimizer(network, "adamw", 0.1, 0.05, eps=1e-7, betas=(0.8, 0.9))
    names = {id(p): name for name, p in network.named_parameters()}
    decay = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert decay == {0.0: {"cls_token", "linear.bias"}, 0.05: {"temperature", "linear.weight"}}
    assert (optimizer.defaults["eps"], tuple(optimizer.defaults["betas"])) == (1e-7, (0.8, 0.9))


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_a_checkpoint_gives_back_counters_and_no_option_that_a_flag_sets(name):
    network = nn.Linear(4, 2)

    def build(decay: float, momentum: float) -> torch.optim.Optimizer:
        return build_timm_optimizer(network, name, 0.1, decay, momentum)

    saved = build(0.05, 0.9)
    network(torch.ones(1, 4)).sum().backward()
    saved.step()
    saved.param_groups[0]["lr"] = 0.01  # of its epoch
    resumed = build(0.5, 0.8)
    wanted = [dict(group) for group in resumed.param_groups]
    restore({"optimizer": saved.state_dict()}, counters_of(resumed), optimizer=resumed)
    for group, own, old in zip(resumed.param_groups, wanted, saved.param_groups, strict=True):
        for option in {"weight_decay", "momentum", "eps", "betas"} & set(group):
            assert group[option] == own[option], option
        for option in {"lr", "step"} & set(old):
            assert group[option] == old[option], option


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_norm_of_all_gradients_is_clipped_and_a_nan_leaves_the_step_out(name):
    network = nn.Linear(4, 2)
    optimizer = build_timm_optimizer(network, name, 0.1, 0.0)
    network(torch.full((1, 4), 10.0)).sum().backward()
    before = network.weight.detach().clone()
    assert step_unless_not_finite(optimizer, clip_total_grad_norm_(list(network.parameters()), 0.5)) == 0
    total = torch.cat([p.grad.flatten() for p in network.parameters()]).norm()
    assert total.item() == pytest.approx(0.5, rel=1e-4)
    after = network.weight.detach().clone()
    assert not torch.equal(before, after)
    network.bias.grad[0] = torch.nan
    assert step_unless_not_finite(optimizer, clip_total_grad_norm_(list(network.parameters()), None)) == 1
    assert torch.equal(network.weight.detach(), after)


def test_average_follows_parameters_statistics_and_counters():
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = NetworkEMA(network, 0.9)
    expected = {name: value.clone().double() for name, value in network.state_dict().items()}
    for _ in range(3):
        network(torch.randn(5, 3))
        with torch.no_grad():
            network[0].weight.add_(1)
        ema.update(network)
        for name, value in network.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value if value.is_floating_point() else value.double()
    for name, value in ema.network.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)
    assert not ema.network.training and not any(p.requires_grad for p in ema.network.parameters())


# --- Accuracy ---------------------------------------------------------------------------------------------------------


class FirstPixel(nn.Module):
    """Logits that are the first seven pixels of an image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :7] * 5


def classify(rank: int = 0) -> list[float]:
    pixels = np.random.default_rng(1).integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)
    images = ArraySource("noise", pixels, np.arange(11) % 7, list("abcdefg"))
    dataset = EvalDataset(images, EvalTransform(8, 8, MEAN, STD))
    result = evaluate_classifier(FirstPixel(), dataset, Precision("fp32", torch.device("cpu")), batch_size=2)
    return [result[name] for name in ("loss", "acc1", "acc5")]


def test_accuracy_is_exact_on_one_and_on_three_processes():
    pixels = np.random.default_rng(1).integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)
    logits = (pixels[:, 0, :7, 0] / 255 - MEAN[0]) / STD[0] * 5
    losses, hits = [], np.zeros(2)
    for row, label in zip(logits, np.arange(11) % 7, strict=True):
        losses.append(np.log(np.exp(row).sum()) - row[label])
        place = (row > row[label]).sum()
        hits += (place < 1, place < 5)
    expected = [np.mean(losses), *100 * hits / 11]
    np.testing.assert_allclose(classify(), expected, rtol=1e-5)
    for found in run_processes(classify, 3):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- Data sets --------------------------------------------------------------------------------------------------------


def write_inaturalist(root) -> None:
    levels = [{"name": f"species {i}", "genus": f"genus {i // 2}"} for i in range(4)]
    (root / "categories.json").write_text(json.dumps(levels))
    for part, categories in (("train", [3, 0, 1, 2]), ("val", [0, 3])):
        names = [f"{part}/{category}/{i}.png" for i, category in enumerate(categories)]
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(root / name)
        content = {
            "images": [{"id": 10 + i, "file_name": name} for i, name in enumerate(names)],
            "annotations": [{"image_id": 10 + i, "category_id": c} for i, c in reversed(list(enumerate(categories)))],
        }
        (root / f"{part}2019.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("category", "classes"), [("name", 4), ("genus", 2)])
def test_inaturalist_is_read_at_every_level(category, classes, tmp_path):
    write_inaturalist(tmp_path)
    train, val = open_inaturalist(tmp_path, 2019, category)
    assert (len(train), len(val), len(train.classes)) == (4, 2, classes)
    for part, categories in ((train, [3, 0, 1, 2]), (val, [0, 3])):
        level = [f"species {c}" if category == "name" else f"genus {c // 2}" for c in categories]
        assert [part.classes[part.label(i)] for i in range(len(part))] == level
        assert part.load(0).decode().shape == (4, 4, 3)
    with pytest.raises(ValueError, match=r"train2018\.json"):
        open_inaturalist(tmp_path, 2018)
    content = json.loads((tmp_path / "val2019.json").read_text())
    lost = content["annotations"].pop()["image_id"]
    (tmp_path / "val2019.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"val2019\.json: {lost!r} belongs to an image without an annotation"):
        open_inaturalist(tmp_path, 2019, category)
    (tmp_path / "categories.json").write_text("[")
    with pytest.raises(ValueError, match="a JSON file of iNaturalist 2019 is damaged"):
        open_inaturalist(tmp_path, 2019, category)


def test_data_set_names_choose_how_a_path_is_read(tmp_path, monkeypatch):
    from shared.supervised import data

    calls = []
    monkeypatch.setattr(data, "open_source", lambda *args, **kwargs: calls.append((args, kwargs)))
    flags = argparse.Namespace(data_path=str(tmp_path), val_path=None, allow_absolute_paths=False, max_megapixels=9)
    flags.inat_category, flags.shared_classes_only = "name", False
    flags.data_set, flags.eval = "CIFAR100", False
    open_train_and_val(flags)
    assert calls == [(("cifar100", part), {"download_root": str(tmp_path)}) for part in ("train", "val")]
    write_inaturalist(tmp_path)
    flags.data_set = "INAT19"
    assert len(open_train_and_val(flags)[0]) == 4
    for data_set in ("CIFAR10", "INAT"):
        flags.data_set = data_set
        for name, value in (("val_path", "v"), ("shared_classes_only", True)):
            with pytest.raises(ValueError, match=f"--{name} .*--data-set {data_set}"):
                open_train_and_val(argparse.Namespace(**vars(flags) | {name: value}))
    flags.data_path = None
    with pytest.raises(ValueError, match="--data-set INAT needs --data_path"):
        open_train_and_val(flags)
    flags.data_set = "IMNET"
    monkeypatch.undo()
    assert [len(part) for part in open_train_and_val(flags)] == [1920, 360]


def test_flags_are_known_with_dashes_and_underscores():
    parser = AnyDashParser()
    parser.add_argument("--one-two", type=int)
    parser.add_argument("--three_four", default="")
    args = parser.parse_args(["--one_two=3", "--three-four", "a_b-c"])
    assert (args.one_two, args.three_four) == (3, "a_b-c")
    with pytest.raises(SystemExit):
        parser.parse_args(["--five-six", "1"])


def test_a_teacher_sees_images_of_one_channel_if_the_student_does(tmp_path):
    network = timm.create_model("test_resnet", num_classes=3, in_chans=1).eval()
    torch.save({"model": network.state_dict()}, tmp_path / "teacher.pth")
    teacher = build_teacher("test_resnet", str(tmp_path / "teacher.pth"), 3, in_chans=1)
    images = torch.rand(2, 1, 64, 64)
    assert torch.equal(teacher(images), network(images))
    with pytest.raises(ValueError, match="does not fill --teacher-model test_resnet"):
        build_teacher("test_resnet", str(tmp_path / "teacher.pth"), 3)
    with pytest.raises(ValueError, match="--in_chans 1: torchvision's --teacher-model squeezenet1_0 takes 3 channels"):
        build_teacher("squeezenet1_0", str(tmp_path / "teacher.pth"), 3, in_chans=1)


def test_a_teacher_is_one_for_images_of_the_students_size(tmp_path):
    network = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    torch.save(network.state_dict(), path := tmp_path / "teacher.pth")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(build_teacher("test_vit", str(path), 3, input_size=32)(images), network(images))
    with pytest.raises(ValueError, match="does not fill --teacher-model test_vit at --input-size 48"):
        build_teacher("test_vit", str(path), 3, input_size=48)


@pytest.mark.parametrize("name", ["googlenet", "vgg11", "alexnet"])
def test_networks_without_stochastic_depth_say_so_and_give_logits_alone(name, capsys):
    network = build_library_classifier(name, 3, img_size=64, drop_rate=0.0, drop_path_rate=0.1)
    assert network(torch.rand(2, 3, 64, 64)).shape == (2, 3)
    assert f"--drop-path 0.1 has no effect on --model {name}" in capsys.readouterr().out


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m1", "original", "v0", "augmix-m10"])
def test_every_operation_of_a_policy_takes_every_strength(policy):
    transform = TrainTransform(40, MEAN, STD, auto_augment=policy, erase_p=0.0)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for step in transform.augment.transforms:
        for operation in getattr(step, "ops", None) or [op for ops in getattr(step, "policy", ()) for op in ops]:
            operation.prob = 1.0
            for magnitude in (0, 5, 10):  # 10 posterizes to 0 bits
                operation.magnitude, operation.magnitude_std = magnitude, 0
                assert np.asarray(operation(Image.fromarray(pixels))).shape == pixels.shape
    assert transform(pixels).shape == (3, 40, 40)


def test_posterize_keeps_the_highest_bits():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for bits in (0, 1, 4, 8):
        expected = pixels & np.uint8(256 - 2 ** (8 - bits) if bits else 0)
        assert np.array_equal(np.asarray(posterize(Image.fromarray(pixels), bits)), expected)


def test_crops_have_the_asked_share_of_the_image_also_where_views_are_small():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    whole = {"auto_augment": None, "color_jitter": None, "erase_p": 0.0, "crop_scale": (1.0, 1.0), "flip": False}
    resized = np.asarray(Image.fromarray(pixels).resize((20, 20), Image.Resampling.BICUBIC)) / 255
    view = TrainTransform(20, MEAN, STD, **whole)(pixels).permute(1, 2, 0).numpy() * STD + MEAN
    assert np.abs(view - resized).max() < 0.1  # a crop of the whole area is nearly a square
    with pytest.raises(ValueError, match="--rand_augment nonsense"):
        TrainTransform(20, MEAN, STD, auto_augment="nonsense", augment_flag="--rand_augment")


def test_classes_without_images_are_not_predicted():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3))
    nn.init.zeros_(network[1].weight)
    network[1].bias.data = torch.tensor([3.0, 2.0, 1.0])
    images = EvalDataset(source(2, 8), EvalTransform(8, 8, MEAN, STD), rows=[1])  # of class 1
    precision = Precision("fp32", torch.device("cpu"))
    results = [evaluate_classifier(network, images, precision, 2, absent=absent) for absent in ((), (0,))]
    assert [result["acc1"] for result in results] == [0, 100]
    assert results[1]["loss"] == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6)
