"""Pictures show what they are given."""

import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from swav.pictures import save_curves, save_views


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are saved, to look at their texts."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k))
    return figures


def test_every_view_of_every_resolution_is_shown_with_its_number(tmp_path, drawn):
    groups = [torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(10, 1, 16, 16, dtype=torch.uint8)]
    assert save_views(groups, tmp_path / "views.png").stat().st_size > 1000
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert titles == [f"crop {i}, {32 if i < 2 else 16} px" for i in range(12)]


def line(step: int, **values) -> str:
    usage = {"prototypes_used": 5.0, "prototype_perplexity": 4.0, "ln_k": 1.8}
    return json.dumps({"step": step, "loss": 2 - step / 10, **usage, **values}) + "\n"


@pytest.mark.parametrize("with_codes", [True, False])
def test_curves_show_the_numbers_of_the_log(with_codes, tmp_path, drawn):
    log = [json.dumps({"step": 0, "knn_top1": 30.0}) + "\n", json.dumps({"step": 1, "loss": None}) + "\n"]
    log += [line(step, **({"code_entropy": 1.0} if with_codes else {})) for step in (2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(log))
    save_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    loss, prototypes, knn = drawn[0].axes
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [1.8, 1.7])
    assert len(loss.lines) == (3 if with_codes else 2)  # DeepCluster-v2 has clusters, no codes
    np.testing.assert_allclose(prototypes.lines[1].get_ydata(), [4, 4])
    np.testing.assert_allclose(knn.lines[0].get_ydata(), [30.0])


def test_a_log_without_finite_steps_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": None}) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no training steps"):
        save_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
