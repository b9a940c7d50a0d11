import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from shared.images.loading import EvalTransform
from shared.images.sources import ArraySource
from shared.pictures.report import RECALL, Plot, Report, accuracy_plot, save_curves, save_views

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


def test_a_small_difference_of_the_loss_does_not_fill_the_axes(drawn, tmp_path):
    log = write_log(tmp_path / "metrics.jsonl", {"step": 2, "loss": 4.98}, {"step": 4, "loss": 4.9})
    save_curves(log, tmp_path / "curves.png", "Training", [Plot("Loss", "nats", {"loss": ""})])
    low, high = drawn[0].axes[0].get_ylim()
    assert high - low == pytest.approx(1)


def test_a_log_without_finite_steps_is_an_error(tmp_path):
    log = write_log(tmp_path / "metrics.jsonl", {"step": 2, "loss": None, "kl": None}, {"step": 2, "knn_top1": 50.0})
    with pytest.raises(ValueError, match="holds no training steps"):
        save_curves(log, tmp_path / "curves.png", "Training", [LOSS, accuracy_plot("k-NN")])


def test_views_stand_at_relative_sizes_with_their_titles(drawn, tmp_path):
    large, small = torch.full((2, 3, 32, 32), 200, dtype=torch.uint8), torch.zeros(5, 1, 16, 16, dtype=torch.uint8)
    titles = ["global {n}, {px} px"] * 2 + ["local {n}"] * 5
    save_views([large, small], titles, tmp_path / "views.png", "One image", per_row=3)
    _, *titles = [text.get_text() for text in drawn[0].texts if text.get_text()]
    assert titles == ["global 1, 32 px", "global 2, 32 px", *(f"local {n}" for n in range(1, 6))]
    places = [image.get_extent() for image in drawn[0].axes[0].images]  # left, right, bottom, top
    heights = [top - bottom for *_, bottom, top in places]
    assert heights[2] == pytest.approx(heights[0] / 2)
    bottoms = [round(bottom, 6) for _, _, bottom, _ in places]
    assert [bottoms.count(b) for b in dict.fromkeys(bottoms)] == [2, 3, 2]
    assert Image.open(tmp_path / "views.png").size[0] > 100


# --- Report -----------------------------------------------------------------------------------------------------------

LINES = (
    {"step": 0, "knn_top1": 30.0},
    {"step": 10, "loss": None},  # every step was left out
    {"step": 20, "loss": 6.2},
    {"step": 30, "loss": 5.1},
    {"step": 30, "knn_top1": 42.5},
)


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    monkeypatch.setattr("shared.pictures.report_page.write_page", lambda path, *_: path.with_name("report.html"))


def report_of(folder: Path, *lines: dict, problems: tuple = (), **flags) -> Report:
    write_log(folder / "metrics.jsonl", *lines)
    health = SimpleNamespace(warnings=dict(enumerate(problems)))
    args = SimpleNamespace(**{"pictures": True, "data_path": None} | flags)
    return Report(
        SimpleNamespace(output_dir=folder, path=folder / "checkpoint.pth", health=health, args=args, device="cpu")
    )


def knn_monitor(labelled: bool) -> SimpleNamespace:
    source = ArraySource("val", np.zeros((12, 8, 8), dtype=np.uint8), np.arange(12) % 3, [*"abc"])
    transform = EvalTransform(8, 8, (0.5,) * 3, (0.5,) * 3)
    reason = None if labelled else "the images have no classes"
    images = SimpleNamespace(name="12 images of val", images=range(12))
    return SimpleNamespace(
        disabled_reason=reason,
        val=SimpleNamespace(source=source),
        transform=transform,
        device="cpu",
        without_labels=images,
    )


def test_the_text_states_result_problems_files_and_commands(tmp_path, capsys):
    report = report_of(tmp_path, *LINES, problems=["step 30: COLLAPSE"])
    report.draw("views.png", lambda path: path.write_bytes(b""))
    report.commands.append("python next.py")
    report.finish(["as much"], knn_monitor(labelled=True), own_images="python own.py")
    random, chance = "30.0 +- 27.1 % with random weights", "(chance 33.3 %): not distinguishable from random weights"
    accuracy = f"{random}, 42.5 +- 28.6 % after 30 steps {chance}"
    assert capsys.readouterr().out.splitlines() == [
        "Result    loss 6.200 at step 20, loss 5.100 at step 30",
        "          as much",
        f"          k-NN on val: 12 images, 3 classes: {accuracy} (differences up to 28.1 are chance)",
        "Problems  step 30: COLLAPSE",
        f"Files     {tmp_path / 'checkpoint.pth'} (the same command resumes from it)",
        f"          {tmp_path / 'metrics.jsonl'} (every few steps), {tmp_path / 'log.txt'} (every epoch)",
        f"Pictures  {tmp_path / 'pictures/views.png'}",
        "Next      python next.py",
        "          python own.py",
        f"Page      {tmp_path / 'report.html'}",
    ]


def test_a_run_without_labels_or_finite_steps(tmp_path, capsys):
    report = report_of(tmp_path, {"step": 10, "loss": None}, pictures=False, data_path="/my/images")
    report.draw("views.png", lambda path: pytest.fail("no pictures were asked for"))
    report.draw_neighbours(None, None, knn_monitor(labelled=False))
    report.finish(knn=knn_monitor(labelled=False))
    printed = capsys.readouterr().out
    assert "no k-NN evaluation: the images have no classes" in printed
    assert not any(title in printed for title in ("Problems", "Pictures", "Next", "Page"))


def test_a_picture_that_fails_is_named_and_the_run_ends_as_it_would(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shared.pictures.report_page.write_page", lambda *_: {}["flag"])
    knn = knn_monitor(labelled=False)
    report = report_of(tmp_path, {"step": 10, "loss": None})
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
