import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dino.main_dino import parse_args as parse_dino
from shared.images.loading import EvalTransform
from shared.images.sources import ArraySource
from shared.pictures.report import RECALL, Plot, Report, accuracy_plot, save_curves

LOSS = Plot("Loss", "nats", {"loss": "", "kl": "KL"}, reference=("ln_k", "ln K"))


def write_log(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_curves_show_the_lines_that_have_their_values(drawn, tmp_path):
    log = write_log(
        tmp_path / "metrics.jsonl",
        {"step": 2, "loss": 3.0, "kl": 1.0, "ln_k": 4.0},
        {"step": 4, "loss": None, "kl": None, "ln_k": 4.0},
        {"step": 6, "loss": 2.0, "kl": 0.5, "ln_k": 4.0},
        {"step": 6, "knn_top1": 50.0},
        {"step": 0, "recall_at_1": 2.0, "recall_chance": 0.5},
        {"step": 6, "recall_at_1": 30.0, "recall_chance": 0.5},
    )
    save_curves(
        log, tmp_path / "curves.png", "Training", [LOSS, accuracy_plot("k-NN"), accuracy_plot("SNN", "snn"), RECALL]
    )
    loss, knn, recall = drawn[0].axes
    assert [line.get_xydata().tolist() for line in loss.lines] == [
        [[2, 3], [6, 2]],
        [[2, 1], [6, 0.5]],
        [[2, 4], [6, 4]],
    ]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["KL", "ln K"]
    assert [line.get_xydata().tolist() for line in recall.lines] == [[[0, 2], [6, 30]], [[0, 0.5], [6, 0.5]]]
    assert (
        len(knn.lines) == 1
        and knn.lines[0].get_xydata().tolist() == [[6, 50]]
        and knn.get_ylim()[1] - knn.get_ylim()[0] >= 10
    )


def test_a_log_without_finite_steps_is_an_error(tmp_path):
    log = write_log(tmp_path / "metrics.jsonl", {"step": 2, "loss": None, "kl": None}, {"step": 2, "knn_top1": 50.0})
    with pytest.raises(ValueError, match="holds no training steps"):
        save_curves(log, tmp_path / "curves.png", "Training", [LOSS, accuracy_plot("k-NN")])


# --- Report -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    monkeypatch.setattr("shared.pictures.report_page.write_page", lambda path, *_: path.with_name("report.html"))


def report_of(folder: Path, **flags) -> Report:
    """Of a run whose only step was left out."""
    write_log(folder / "metrics.jsonl", {"step": 10, "loss": None})
    args = SimpleNamespace(**{"pictures": True, "data_path": None} | flags)
    run = {"output_dir": folder, "path": folder / "checkpoint.pth", "args": args, "device": "cpu"}
    return Report(SimpleNamespace(**run, health=SimpleNamespace(warnings={})), "dino/main_dino.py")


def monitor_without_labels() -> SimpleNamespace:
    source = ArraySource("val", np.zeros((12, 8, 8), dtype=np.uint8), np.arange(12) % 3, [*"abc"])
    return SimpleNamespace(
        disabled_reason="the images have no classes",
        val=SimpleNamespace(source=source),
        transform=EvalTransform(8, 8, (0.5,) * 3, (0.5,) * 3),
        device="cpu",
        without_labels=SimpleNamespace(name="12 images of val", images=range(12)),
    )


def test_a_run_without_labels_or_finite_steps(tmp_path, capsys):
    (tmp_path / "bad_images.txt").write_text("a.png\tempty file\n")
    args = parse_dino(["--data_path", "/my/images", "--max_bad_fraction", "0.3", "--pictures", "off"])
    report = report_of(tmp_path, **vars(args))
    report.draw("views.png", lambda path: pytest.fail("no pictures were asked for"))
    report.draw_neighbours(None, None, monitor_without_labels())
    report.finish(knn=monitor_without_labels())
    printed = capsys.readouterr().out
    assert "no k-NN evaluation: the images have no classes" in printed
    assert "Problems  unreadable images, in whose places others were read: 1, see " in printed
    features = f"dino {tmp_path / 'checkpoint.pth'} --data_path /my/images --max_bad_fraction 0.3"
    assert f"extract_features.py {features} --out {tmp_path / 'features.npz'}" in printed
    assert not any(title in printed for title in ("Pictures", "Page"))


def test_a_picture_that_fails_is_named_and_the_run_ends_as_it_would(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shared.pictures.report_page.write_page", lambda *_: {}["flag"])
    knn = monitor_without_labels()
    report = report_of(tmp_path)
    report.draw("views.png", lambda path: [].pop())
    report.draw_curves("Training", [LOSS])
    broken = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Threshold(torch.inf, torch.nan))
    report.draw_neighbours(broken, ArraySource("images", np.zeros((2, 8, 8), dtype=np.uint8)), knn)
    report.finish()
    printed = capsys.readouterr().out
    folder = tmp_path / "pictures"
    assert f"Pictures  {folder / 'views.png'} could not be drawn: IndexError: pop from empty list" in printed
    log = tmp_path / "metrics.jsonl"
    assert f"{folder / 'curves.png'} could not be drawn: ValueError: {log} holds no training steps" in printed
    assert f"{folder / 'neighbours.png'} could not be drawn: ValueError: 2 of 2 feature vectors are not" in printed
    assert f"Page      {tmp_path / 'report.html'} could not be drawn: KeyError: 'flag'" in printed
