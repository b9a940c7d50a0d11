"""Pictures show what they are given, with all text inside the sheet."""

import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from dino.pictures import save_curves, save_views
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
from shared.run.log import read_log

RED, GREEN, BLUE = (np.full((3, 1, 1), 40, dtype=np.uint8) for _ in range(3))
RED[0], GREEN[1], BLUE[2] = 250, 250, 250


def flat_image(color: np.ndarray, side: int = 12) -> torch.Tensor:
    return torch.from_numpy(np.broadcast_to(color, (3, side, side)).copy())


def read(path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def share_of(picture: np.ndarray, color) -> float:
    return float((np.abs(picture.astype(int) - np.asarray(color).reshape(3)).max(axis=2) < 3).mean())


def hex_color(text: str) -> tuple[int, ...]:
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are saved, to look at their texts."""
    figures = []
    save = Figure.savefig

    def savefig(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def texts(figure: Figure) -> list[str]:
    found = [t.get_text() for t in figure.texts]
    for axes in figure.axes:
        found += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
    return [t for t in found if t]


def assert_nothing_is_clipped(figure: Figure) -> None:
    canvas = figure.bbox
    for artist in [*figure.texts, *figure.axes, *(a.get_legend() for a in figure.axes if a.get_legend())]:
        box = artist.get_tightbbox()
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= canvas.x1 + 1 and box.y1 <= canvas.y1 + 1, artist


def test_views_keep_their_pixels_and_relative_sizes(tmp_path, drawn):
    views = [flat_image(RED, 32), flat_image(GREEN, 32), *[flat_image(BLUE, 16)] * 10]
    picture = read(save_views(views, tmp_path / "views.png"))
    assert share_of(picture, RED) == pytest.approx(share_of(picture, GREEN), rel=0.02)
    assert share_of(picture, BLUE) == pytest.approx(10 / 4 * share_of(picture, RED), rel=0.05)
    assert {"global 2, 32 px", "local 10, 16 px"} <= set(texts(drawn[0]))
    assert_nothing_is_clipped(drawn[0])


def test_views_take_titles_and_two_views_are_enough(tmp_path, drawn):
    save_views([flat_image(RED), flat_image(GREEN)], tmp_path / "views.png", titles=["anchor", "target"])
    assert {"anchor", "target"} <= set(texts(drawn[0]))
    assert_nothing_is_clipped(drawn[0])


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
    agree, differ = share_of(picture, hex_color(AGREE)), share_of(picture, hex_color(DIFFER))
    assert agree == pytest.approx(2 * differ, rel=0.1)
    assert {"neighbour 3", "1  0.60"} <= set(texts(drawn[0]))
    assert any("4 of 6" in text for text in texts(drawn[0]))
    assert_nothing_is_clipped(drawn[0])


def test_neighbours_without_labels_have_no_frames(tmp_path):
    picture = read(save_neighbours([flat_image(RED)], [[flat_image(BLUE)] * 2], tmp_path / "neighbours.png"))
    assert share_of(picture, hex_color(AGREE)) == share_of(picture, hex_color(DIFFER)) == 0


def test_neighbours_must_match_the_queries(tmp_path):
    with pytest.raises(ValueError):
        save_neighbours([flat_image(RED)] * 2, [[flat_image(BLUE)]], tmp_path / "neighbours.png")


def write_log(path, steps: int = 40) -> None:
    lines = [{"step": 0, "epoch": 0, "knn_top1": 30.0}]
    for step in range(10, 10 * steps, 10):
        lines.append({"step": step, "epoch": 0, "loss": 7 - step / 100, "teacher_entropy": 5.0, "kl": 1.0, "ln_k": 6.9})
    lines.append({"step": 10 * steps, "epoch": 1, "knn_top1": 91.2})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves_show_the_numbers_of_the_log(tmp_path, drawn):
    write_log(tmp_path / "metrics.jsonl")
    save_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    loss, _, knn = drawn[0].axes
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [7 - step / 100 for step in range(10, 400, 10)])
    np.testing.assert_allclose(knn.lines[0].get_ydata(), [30.0, 91.2])
    assert [t.get_text() for t in knn.texts] == ["30.0", "91.2"]
    assert_nothing_is_clipped(drawn[0])


def test_short_run_is_visible_and_its_noise_not_magnified(tmp_path, drawn):
    lines = ['{"step": 0, "knn_top1": 83.3}', '{"step": 5, "loss": 6.7}', '{"step": 5, "knn_top1": 83.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    save_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    loss, knn = drawn[0].axes
    assert loss.lines[0].get_marker() == "."
    low, high = knn.get_ylim()
    assert high - low == pytest.approx(10)


def test_curves_without_evaluation_have_one_panel_less(tmp_path, drawn):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 3.0}\n{"step": 20, "loss": 2.0}\n')
    save_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert len(drawn[0].axes) == 1


def test_log_without_steps_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "knn_top1": 30.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no training steps"):
        save_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")


def test_unfinished_last_line_is_left_out_and_a_broken_one_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_log(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_log(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 is not a JSON object"):
        read_log(path)


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
