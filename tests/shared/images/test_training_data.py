import argparse

import numpy as np
import pytest
import torch
from PIL import Image

from shared.images.sources import open_source
from shared.images.subsets import Subset, listed_images
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


# --- Lists of labelled images -----------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    for name in ("n1", "n2"):
        for number in range(3):
            path = tmp_path / "images" / name / f"{name}_{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4, 3), 10 * number, dtype=np.uint8)).save(path)
    return open_source(str(tmp_path / "images"), "all")


def test_names_with_and_without_their_folder_are_found_in_the_order_of_the_source(source, tmp_path):
    (tmp_path / "list.txt").write_text("n2/n2_0.png\n\n n1_2.png \n")
    indices = listed_images(source, str(tmp_path / "list.txt"))
    assert indices.tolist() == [2, 3]
    subset = Subset(source, indices, "two images")
    assert len(subset) == 2 and subset.labels.tolist() == [0, 1] and subset.classes == ["n1", "n2"]
    assert subset.path(1) == source.path(3) and subset.load(0).decode()[0, 0, 0] == 20


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), ("n1_0.png\nn3_0.png\n", "1 of its 2 images are not in")]
)
def test_a_list_that_does_not_fit_names_itself_and_the_flag(source, tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        listed_images(source, str(tmp_path / "list.txt"), "--labels")
    assert f"--labels {tmp_path / 'list.txt'}" in str(error.value)
