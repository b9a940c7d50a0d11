import json

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from shared.pictures.report import Plot, accuracy_plot, save_curves, save_views, view_tiles

LOSS = Plot("Loss", "nats", {"loss": "", "kl": "KL"}, reference=("ln_k", "ln K"))


@pytest.fixture
def figures(monkeypatch):
    """Figures as they are saved."""
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args: (drawn.append(figure), save(figure, *args)))
    return drawn


def write_log(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_curves_show_the_lines_that_have_their_values(figures, tmp_path):
    log = write_log(
        tmp_path / "metrics.jsonl",
        {"step": 2, "loss": 3.0, "kl": 1.0, "ln_k": 4.0},
        {"step": 4, "loss": None, "kl": None, "ln_k": 4.0},
        {"step": 6, "loss": 2.0, "kl": 0.5, "ln_k": 4.0},
        {"step": 6, "knn_top1": 50.0},
    )
    save_curves(log, tmp_path / "curves.png", "Training", [LOSS, accuracy_plot("k-NN"), accuracy_plot("SNN", "snn")])
    loss, knn = figures[0].axes
    assert [line.get_xydata().tolist() for line in loss.lines] == [
        [[2, 3], [6, 2]],
        [[2, 1], [6, 0.5]],
        [[2, 4], [6, 4]],
    ]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["KL", "ln K"]
    assert knn.lines[0].get_xydata().tolist() == [[6, 50]] and knn.get_ylim()[1] - knn.get_ylim()[0] >= 10


def test_a_log_without_finite_steps_is_an_error(tmp_path):
    log = write_log(tmp_path / "metrics.jsonl", {"step": 2, "loss": None, "kl": None}, {"step": 2, "knn_top1": 50.0})
    with pytest.raises(ValueError, match="holds no training steps"):
        save_curves(log, tmp_path / "curves.png", "Training", [LOSS, accuracy_plot("k-NN")])


def test_views_stand_at_relative_sizes_with_their_titles(figures, tmp_path):
    large, small = torch.full((2, 3, 32, 32), 200, dtype=torch.uint8), torch.zeros(5, 1, 16, 16, dtype=torch.uint8)
    groups = [view_tiles(large, "global {n}, {px} px"), view_tiles(small, "local {n}", first=0)]
    save_views(groups, tmp_path / "views.png", "One image", per_row=3)
    _, *titles = [text.get_text() for text in figures[0].texts if text.get_text()]
    assert titles == ["global 1, 32 px", "global 2, 32 px", *(f"local {n}" for n in range(5))]
    places = [image.get_extent() for image in figures[0].axes[0].images]  # left, right, bottom, top
    heights = [top - bottom for *_, bottom, top in places]
    assert heights[2] == pytest.approx(heights[0] / 2)
    bottoms = [round(bottom, 6) for _, _, bottom, _ in places]
    assert [bottoms.count(b) for b in dict.fromkeys(bottoms)] == [2, 3, 2]
    assert Image.open(tmp_path / "views.png").size[0] > 100
