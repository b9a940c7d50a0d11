"""Sheets of pictures: pixels as they are, frames around neighbours, all text inside."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from shared.evaluation.neighbours import Gallery, save_nearest
from shared.images.sources import ArraySource, open_source
from shared.pictures.attention import attended_patches
from shared.pictures.curves import Curve, Panel, save_panels
from shared.pictures.sheets import (
    AGREE,
    DIFFER,
    Tile,
    link_images,
    save_sheet,
    thumbnail,
    to_pixels,
)


def read(path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def share_of(picture: np.ndarray, color: str) -> float:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(picture.astype(int) - wanted).max(axis=2) < 3).mean())


def assert_nothing_is_clipped(figure: Figure) -> None:
    canvas = figure.bbox
    for artist in [*figure.texts, *figure.axes]:
        box = artist.get_tightbbox()
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= canvas.x1 + 1 and box.y1 <= canvas.y1 + 1, artist


# --- Names of files and classes ---------------------------------------------------------------------------------------

NAMES = {
    "$5_$10": "$5_$10",
    "a_$b": "a_$b",
    "caf\udce9": "caf\ufffd",  # Latin-1, as Python reads the name of such a folder
    "\U00013000": "\\u13000",  # a hieroglyph, which few machines have a font for
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_are(name, tmp_path, drawn):
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    save_sheet([[Tile(pixels, name, name)]], tmp_path / "sheet.png", f"{name}\n{name}")
    assert [text.get_text() for text in drawn[0].texts] == [NAMES[name]] * 4
    save_panels([Panel("loss", "step", "nats", [Curve([1, 2], [2, 1])])], tmp_path / "curves.png", name)
    assert drawn[1].get_suptitle() == NAMES[name]


# --- Pixels -----------------------------------------------------------------------------------------------------------


def test_one_channel_becomes_grey_and_floats_of_any_channels_are_stretched():
    assert to_pixels(torch.full((1, 2, 2), 7, dtype=torch.uint8)).tolist() == [[[7] * 3] * 2] * 2
    ramp = torch.linspace(-3, -2.9, 201).reshape(1, 1, 201)
    for channels, colours in ((1, 1), (2, 1), (3, 3), (5, 3)):
        pixels = to_pixels(torch.cat([ramp * (-1) ** c for c in range(channels)]))
        assert pixels.shape == (1, 201, 3) and len(np.unique(pixels[0], axis=1)) == 201
        assert pixels[0, [0, 100, 200], 0].tolist() == [0, 128, 255] and len({*pixels[0, 0].tolist()}) == min(
            colours, 2
        )
    with pytest.raises(ValueError, match="uint8"):
        to_pixels(torch.zeros(3, 2, 2, dtype=torch.int32))


# --- Attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.6, 0.99, 1.0])
def test_attended_patches_are_the_fewest_that_hold_the_share(threshold):
    attention = torch.rand(3, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for values, mask in zip(attention, attended_patches(attention, threshold), strict=True):
        total = values.sum()
        assert values[mask].sum() / total >= threshold - 1e-9
        if threshold < 1:
            least = values[mask].min()
            assert (values[mask].sum() - least) / total < threshold
        assert not (~mask).any() or values[~mask].max() <= values[mask].min()


# --- Nearest neighbours -----------------------------------------------------------------------------------------------

FEATURES = torch.tensor([[1, 0], [0.9, 0.1], [0.8, 0.3], [0, 1], [0.1, 0.9]])


def gallery(labels: list[int] | None) -> Gallery:
    pixels = np.full((5, 8, 8, 3), 40, dtype=np.uint8)
    classes = () if labels is None else (np.array(labels), ["cat", "dog"])
    return Gallery(ArraySource("images", pixels, *classes), range(5), FEATURES)


def test_neighbours_are_framed_by_agreement(tmp_path, drawn):
    path = save_nearest(gallery([0, 0, 1, 1, 1]), gallery([0, 0, 1, 1, 1]), tmp_path / "neighbours.png")
    texts = [found.get_text() for found in drawn[0].texts]
    assert {"neighbour 5", "cat  0.994", "dog  0.936"} <= set(texts) and any("13 of 25" in found for found in texts)
    picture = read(path)
    assert share_of(picture, AGREE) == pytest.approx(13 / 12 * share_of(picture, DIFFER), rel=0.1)
    assert_nothing_is_clipped(drawn[0])


def test_an_image_is_no_neighbour_of_its_own_and_no_classes_have_no_frames(tmp_path, drawn):
    images = gallery(None)
    picture = read(save_nearest(images, images, tmp_path / "neighbours.png"))
    assert share_of(picture, AGREE) == share_of(picture, DIFFER) == 0
    texts = [found.get_text() for found in drawn[0].texts]
    assert "neighbour 4" in texts and "neighbour 5" not in texts and "1.00" not in texts


def test_a_thumbnail_shows_small_pixels_as_squares_and_grey_where_there_is_no_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 12, 3), dtype=np.uint8)
    shown = thumbnail(ArraySource("images", pixels), 0)
    np.testing.assert_array_equal(shown[6::12, 6::12], pixels[0, :, 2:10])  # the centre square
    strip = np.broadcast_to(np.uint8(7), (1, 1, 10**7, 3))  # magnified as a whole it would take 276 GB
    assert (thumbnail(ArraySource("strip", strip), 0) == 7).all()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    assert (thumbnail(open_source(str(tmp_path)), 0) == 128).all()


def test_thumbnails_of_tiff_files_have_the_colours_of_their_images(tmp_path):
    pixels = np.zeros((100, 100, 3), dtype=np.uint8)
    pixels[:, :50], pixels[:, 50:] = (30, 200, 30), (200, 30, 30)
    for mode in ("RGB", "RGBA", "CMYK"):
        Image.fromarray(pixels).convert(mode).save(tmp_path / f"{mode}.tif")
    source = open_source(str(tmp_path))
    for i in range(len(source)):
        assert np.abs(thumbnail(source, i)[48, [10, 80]].astype(int) - pixels[0, [10, 80]]).max() <= 2, source.path(i)


def test_links_of_long_names_are_shortened(tmp_path):
    name = "\u00e4" * 125 + ".png"  # 254 bytes
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / name)
    link_images(open_source(str(tmp_path)), {"group": [0]}, tmp_path / "links")
    (link,) = (tmp_path / "links/group").iterdir()
    assert link.name.startswith("000000_\u00e4") and link.suffix == ".png" and link.resolve().name == name
