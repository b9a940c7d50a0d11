import argparse

import numpy as np
import pytest
import torch
from PIL import Image

from shared.images.training_data import open_training_data
from shared.images.views import ViewRecipe
from shared.run import flags


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (18, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def open_them(images, tmp_path, sizes):
    parser = argparse.ArgumentParser()
    flags.add_data_flags(parser)
    parser.set_defaults(num_workers=0, augmentation="fast", seed=3, batch_size=4)
    args = parser.parse_args(["--data_path", str(images)])
    recipes = [ViewRecipe(size, (0.5, 1.0)) for size in sizes]
    return open_training_data(args, recipes, 4, tmp_path, torch.device("cpu"), "--crop_sizes")


def test_an_epoch_has_whole_batches_of_views_in_the_order_of_its_seed(images, tmp_path):
    data = open_them(images, tmp_path, (16, 16, 8))
    assert (data.steps_per_epoch, data.batch_size, data.num_workers) == (2, 4, 0)
    data.sampler.set_epoch(0)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))[:8]
    batches = list(data.loader)
    assert torch.cat([indices for _, _, indices in batches]).tolist() == order.tolist()
    assert [views.shape for views in batches[0][0]] == [(8, 3, 16, 16), (4, 3, 8, 8)]
    assert data.checksum == open_them(images, tmp_path, (16, 16)).checksum


def test_images_smaller_than_the_largest_view_are_said_with_the_flag(images, tmp_path, capsys):
    open_them(images, tmp_path, (8, 18))
    assert "smaller than" not in capsys.readouterr().out
    open_them(images, tmp_path, (8, 24))
    assert "images of 18 pixels are smaller than --crop_sizes 24: views are enlarged" in capsys.readouterr().out
