import zlib

import numpy as np
import pytest

from shared.images import materials
from shared.images.materials import MATERIALS, draw_image, draw_materials, load_materials


def test_the_images_are_the_same_everywhere():
    drawn = draw_materials(24)
    assert drawn.pixels.shape == (24, 32, 32, 3) and drawn.masks.shape == (24, 32, 32)
    assert drawn.labels.tolist() == [*range(12)] * 2
    assert (zlib.crc32(drawn.pixels), zlib.crc32(drawn.masks)) == (504568486, 1735154842)
    more = draw_materials(36)  # a longer series begins with the shorter one
    np.testing.assert_array_equal(more.pixels[:24], drawn.pixels)
    assert not np.array_equal(draw_materials(12, seed=0).pixels, drawn.pixels[:12])


@pytest.mark.parametrize("size_px", [24, 64])
def test_a_mask_is_one_object_inside_the_image(size_px):
    for material in range(len(MATERIALS)):
        image, mask = draw_image(material, size_px, np.random.default_rng(material))
        assert image.shape == (size_px, size_px, 3) and 0.1 < mask.mean() < 0.75
        assert mask[:, [0, -1]].mean() < 0.2 and mask[[0, -1]].mean() < 0.2  # hardly cut off
        grey = image[~mask].astype(float)
        assert np.abs(grey - grey.mean(1, keepdims=True)).mean() < 6  # the wall has no colour, but noise


def test_they_are_drawn_once_and_read_from_then_on(tmp_path, monkeypatch):
    monkeypatch.setattr(materials, "NUMBERS", {"train": 12, "val": 12})
    drawn = load_materials("val", tmp_path)
    monkeypatch.setattr(materials, "draw_materials", None)
    read = load_materials("val", tmp_path)
    for name in ("pixels", "masks", "labels"):
        np.testing.assert_array_equal(getattr(read, name), getattr(drawn, name))
    assert [file.suffix for file in tmp_path.iterdir()] == [".npz"]


def test_a_torn_file_is_drawn_anew_and_a_folder_that_cannot_be_written_does_not_matter(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(materials, "NUMBERS", {"train": 12, "val": 12})
    drawn = load_materials("train", tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    np.testing.assert_array_equal(load_materials("train", tmp_path).pixels, drawn.pixels)
    (tmp_path / "file").touch()
    np.testing.assert_array_equal(load_materials("train", tmp_path / "file").pixels, drawn.pixels)
    assert "the embedded images are not kept: " in capsys.readouterr().err
