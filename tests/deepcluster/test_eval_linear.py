import json

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import functional as TF

from deepcluster.checkpoints import official_names
from deepcluster.convnets import conv_maps
from deepcluster.eval_linear import (
    RandomCrops,
    TenCrops,
    eval_linear,
    parse_args,
    pool_maps,
)
from deepcluster.hub import build_network
from shared.images.loading import BadImages
from shared.images.sources import open_source
from shared.networks.weights import safe_load
from tests.processes import run_processes

FAST = "--workers 0 --epochs 2 --batch_size 8 --device cpu".split()


def test_other_maps_are_averaged_to_the_largest_square_that_fits():
    maps = torch.randn(2, 64, 14, 14)
    torch.testing.assert_close(pool_maps(maps, 3), F.adaptive_avg_pool2d(maps, 12))
    assert pool_maps(torch.randn(1, 2048, 7, 7), 5).shape == (1, 2048, 2, 2)


def test_layers_end_with_their_relu(small_layers):
    network = build_network("alexnet", sobel=True, img_size=64).eval()
    images = torch.randn(1, 3, 64, 64)
    for conv, channels in enumerate((96, 256, 384, 384, 256), start=1):
        maps, before = (conv_maps(network, images, conv, flag) for flag in (False, True))
        assert maps.shape[1] == channels
        torch.testing.assert_close(maps, before.relu())
    torch.testing.assert_close(network.features[17](conv_maps(network, images, 5)), network.maps(images))


def test_random_crops_are_parts_of_the_centre_and_functions_of_their_key(images):
    source = open_source(str(images))
    crops = RandomCrops(source, 32, 1, BadImages(len(source)))
    centre = crops.centre(source.load(5).decode())
    found = set()
    for epoch in range(40):
        crop, label = crops[(epoch, 5)]
        assert label == source.label(5) and crop.shape == (3, 32, 32) and crop.dtype == torch.uint8
        assert torch.equal(crop, crops[(epoch, 5)][0])
        places = [
            (top, left, flip)
            for top in range(6)
            for left in range(6)
            for flip in (False, True)
            if torch.equal((crop.flip(2) if flip else crop), centre[:, top : top + 32, left : left + 32])
        ]
        assert places
        found.add(places[0])
    assert len({flip for *_, flip in found}) == 2 and len(found) > 15


def test_ten_crops_are_torchvisions_with_the_centre_in_fifth_place(images):
    pixels = open_source(str(images)).load(0).decode()
    crops = TenCrops(32)(pixels)
    image = TenCrops(32).centre(pixels)
    assert crops.shape == (10, 3, 32, 32)
    assert torch.equal(crops[4], TF.center_crop(image, [32, 32]))
    assert torch.equal(crops[9], TF.center_crop(image.flip(2), [32, 32]))


@pytest.fixture
def small_checkpoint(tmp_path):
    torch.manual_seed(0)
    network = build_network("test_resnet", img_size=32)
    path = tmp_path / "model.pth.tar"
    state = {"arch": "test_resnet", "state_dict": official_names(network.state_dict()), "args": {"crop_size": 32}}
    torch.save(state, path)
    return path


def evaluate(images, model, *flags):
    flags = ("--data", images, "--val_path", images, "--model", model, *FAST, *flags)
    return eval_linear(parse_args([str(flag) for flag in flags]))


@pytest.mark.parametrize("flags", [("--conv", 2), (), ("--conv", 3, "--tencrops")])
def test_a_probe_learns_and_is_logged(images, small_checkpoint, tmp_path, flags):
    result = evaluate(images, small_checkpoint, "--exp", tmp_path, "--epochs", 12, "--lr", 0.05, *flags)
    assert result["acc1"] > 60  # a third of the images are of each class
    (log,) = tmp_path.glob("linear*_log.txt")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 12 and lines[-1]["train_loss"] < lines[0]["train_loss"]


def test_a_probe_is_not_gone_on_with_as_another_one(images, small_checkpoint, tmp_path):
    evaluate(images, small_checkpoint, "--exp", tmp_path, "--epochs", 1)
    with pytest.raises(ValueError, match=r"--weight_decay -1.0 does not fit .* written with --weight_decay -4"):
        evaluate(images, small_checkpoint, "--exp", tmp_path, "--epochs", 2, "--wd", -1)
    evaluate(images, small_checkpoint, "--exp", tmp_path, "--epochs", 2)  # the rate knows no end


def evaluate_on_rank(rank, *arguments):
    return evaluate(*arguments)


def test_two_processes_train_the_probe_of_one(images, small_checkpoint, tmp_path):
    flags = ("--conv", 2, "--exp")
    result = evaluate(images, small_checkpoint, *flags, tmp_path / "one")
    for of_rank in run_processes(evaluate_on_rank, 2, images, small_checkpoint, *flags, tmp_path / "two"):
        assert of_rank == pytest.approx(result, rel=1e-3)
    one, two = (safe_load(tmp_path / name / "linear_conv2.pth.tar")["state_dict"] for name in ("one", "two"))
    torch.testing.assert_close(one["weight"], two["weight"], rtol=1e-3, atol=1e-5)


def test_bad_input_is_named(images, small_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"--model .* is neither a file nor a release"):
        evaluate(images, tmp_path / "no.pth")
    with pytest.raises(ValueError, match=r"has other classes|no classes"):
        evaluate(images / "class0", small_checkpoint)
    with pytest.raises(SystemExit):
        parse_args(["--data", str(images)])
