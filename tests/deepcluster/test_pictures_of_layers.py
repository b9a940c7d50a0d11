"""Top images per filter and gradient ascent."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from deepcluster import activ_retrieval, gradient_ascent
from deepcluster.convnets import conv_maps
from deepcluster.gradient_ascent import ascend, starting_noise
from deepcluster.hub import load_network
from shared.images.decode import ImageError


def test_the_images_with_the_largest_responses_are_drawn(checkpoint, images, tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(activ_retrieval, "save_sheet", lambda tiles, path, *_: rows.extend(tiles) or path)
    flags = f"--data {images} --model {checkpoint} --conv 1 --exp {tmp_path} --count 3 --workers 0 --device cpu"
    paths = activ_retrieval.activ_retrieval(activ_retrieval.get_args_parser().parse_args(flags.split()))
    assert [path.name for path in paths][:2] == ["layer1-filters0-15.png", "layer1-filters16-31.png"]
    assert len(paths) == 6 and len(rows) == 96 and all(len(row) == 3 for row in rows)
    for row in rows:
        values = [float(tile.caption) for tile in row]
        assert values == sorted(values, reverse=True)
    assert [row[0].title for row in rows[:2]] == ["filter 0", "filter 1"]


def test_images_that_cannot_be_read_are_left_out(checkpoint, images, tmp_path, monkeypatch):
    rows, folder = [], shutil.copytree(images, tmp_path / "images")
    monkeypatch.setattr(activ_retrieval, "save_sheet", lambda tiles, path, *_: rows.extend(tiles) or path)
    good = len(list(folder.rglob("*.png"))) - 1
    next(folder.rglob("*.png")).write_bytes(b"broken")
    flags = f"--data {folder} --model {checkpoint} --conv 1 --exp {tmp_path} --count {good} --workers 0 --device cpu"
    arguments = activ_retrieval.get_args_parser().parse_args(flags.split())
    activ_retrieval.activ_retrieval(arguments)
    assert all("inf" not in tile.caption for row in rows for tile in row)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"--max_bad_fraction 0.01 allows"):
        activ_retrieval.activ_retrieval(arguments)


def test_ascent_makes_each_filter_respond_more(checkpoint):
    network = load_network(checkpoint).requires_grad_(False)
    filters = [3, 0, 9]
    noise = torch.stack([starting_noise(31, f, 64) for f in filters])
    found = ascend(network, 2, noise, filters, lr=0.1, wd=1e-5, sig=0.3, blur_every=5, steps=8)

    def response(batch):
        maps = conv_maps(network, batch, 2, before_relu=True)
        return torch.stack([maps[i, f].mean() for i, f in enumerate(filters)])

    assert (response(found) > response(noise) + 0.05).all()
    alone = ascend(network, 2, noise[1:2], [0], lr=0.1, wd=1e-5, sig=0.3, blur_every=5, steps=8)
    torch.testing.assert_close(alone[0], found[1], atol=1e-3, rtol=1e-3)  # images do not see each other


def test_pictures_of_filters_are_written(checkpoint, tmp_path):
    flags = f"--model {checkpoint} --conv 1 --exp {tmp_path} --niter 2 --idim 64 --filters 5 --batch 2 --device cpu"
    path = gradient_ascent.draw_filters(gradient_ascent.get_args_parser().parse_args(flags.split()))
    names = {file.name for file in tmp_path.glob("layer1*.png")}
    assert names == {"layer1.png", *(f"layer1-channel{i}.png" for i in range(5))}
    with Image.open(tmp_path / "layer1-channel4.png") as picture:
        assert picture.size == (64, 64) and np.asarray(picture).std() > 5
    assert path.name == "layer1.png"


def test_a_layer_that_does_not_exist_is_refused(checkpoint):
    with pytest.raises(ValueError, match="--conv 9: the network has the layers 1 to 5"):
        gradient_ascent.draw_filters(
            gradient_ascent.get_args_parser().parse_args(["--model", str(checkpoint), "--conv", "9"])
        )
