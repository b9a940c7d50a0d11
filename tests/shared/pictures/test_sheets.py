"""Sheets of pictures: pixels as they are, frames around neighbours, all text inside."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from shared.pictures.attention import attended_patches, overlay_mask
from shared.pictures.sheets import (
    AGREE,
    DIFFER,
    Tile,
    colorize,
    magnify,
    save_neighbours,
    save_sheet,
    to_pixels,
    write_png,
)

RED, BLUE = (np.full((3, 1, 1), 40, dtype=np.uint8) for _ in range(2))
RED[0], BLUE[2] = 250, 250


def flat_image(color: np.ndarray, side: int = 12) -> torch.Tensor:
    return torch.from_numpy(np.broadcast_to(color, (3, side, side)).copy())


def read(path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def share_of(picture: np.ndarray, color: str) -> float:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(picture.astype(int) - wanted).max(axis=2) < 3).mean())


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are saved, to look at their texts."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args: (figures.append(figure), save(figure, *args)))
    return figures


def assert_nothing_is_clipped(figure: Figure) -> None:
    canvas = figure.bbox
    for artist in [*figure.texts, *figure.axes]:
        box = artist.get_tightbbox()
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= canvas.x1 + 1 and box.y1 <= canvas.y1 + 1, artist


def test_neighbours_are_framed_by_agreement(tmp_path, drawn):
    path = save_neighbours(
        [flat_image(RED), flat_image(BLUE)],
        [[flat_image(RED)] * 3, [flat_image(RED)] * 3],
        tmp_path / "neighbours.png",
        query_labels=np.array([0, 1]),
        neighbour_labels=torch.tensor([[0, 0, 0], [1, 0, 0]]),
        similarities=torch.tensor([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]]),
    )
    picture = read(path)
    agree, differ = share_of(picture, AGREE), share_of(picture, DIFFER)
    assert agree == pytest.approx(2 * differ, rel=0.1)
    texts = [text.get_text() for text in drawn[0].texts]
    texts += [text for axes in drawn[0].axes for text in (axes.get_title(), axes.get_xlabel())]
    assert {"neighbour 3", "1  0.60"} <= set(texts) and any("4 of 6" in text for text in texts)
    assert_nothing_is_clipped(drawn[0])


def test_neighbours_without_labels_have_no_frames(tmp_path):
    picture = read(save_neighbours([flat_image(RED)], [[flat_image(BLUE)] * 2], tmp_path / "neighbours.png"))
    assert share_of(picture, AGREE) == share_of(picture, DIFFER) == 0


def test_neighbours_must_match_the_queries(tmp_path):
    with pytest.raises(ValueError):
        save_neighbours([flat_image(RED)] * 2, [[flat_image(BLUE)]], tmp_path / "neighbours.png")


def test_long_heading_fits(tmp_path, drawn):
    save_sheet([[Tile(to_pixels(flat_image(RED)))]], tmp_path / "sheet.png", "word " * 20 + "\n" + "more " * 30)
    assert_nothing_is_clipped(drawn[0])


def test_pixels_are_repeated_not_blurred(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    large = magnify(pixels, 10)
    assert large.shape == (12, 20, 3)
    np.testing.assert_array_equal(large[::4, ::4], pixels)
    np.testing.assert_array_equal(read(write_png(tmp_path / "a.png", large)), large)
    np.testing.assert_array_equal(magnify(large, 10), large)


def test_one_channel_becomes_grey_and_floats_are_refused():
    assert to_pixels(torch.full((1, 2, 2), 7, dtype=torch.uint8)).tolist() == [[[7] * 3] * 2] * 2
    with pytest.raises(ValueError, match="uint8"):
        to_pixels(torch.zeros(3, 2, 2))


def test_colours_run_from_smallest_to_largest():
    colours = colorize(np.array([[2.0, 3.0], [4.0, 2.0]]), "gray")
    assert colours[..., 0].tolist() == [[0, 128], [255, 0]]
    assert (colorize(np.ones((2, 2))) == colorize(np.zeros((2, 2)))).all()


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


def test_mask_is_coloured_and_outlined():
    mask = np.zeros((20, 20), dtype=bool)
    mask[5:15, 5:15] = True
    picture = overlay_mask(np.zeros((20, 20, 3), dtype=np.uint8), mask)
    assert (picture[0, 0] == 0).all()
    assert (picture[5, 5:15] == 255).all()
    assert picture[10, 10, 0] > 100 > picture[10, 10, 1]
