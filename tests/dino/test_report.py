"""The end of a run: what was learned, where the files are, and commands that their scripts understand."""

import importlib
import json
import shlex
from types import SimpleNamespace

import numpy as np
import pytest

from dino.report import next_commands, summary
from shared.evaluation.knn_monitor import KNNMonitor
from shared.images.sources import ArraySource


def make_monitor(num_train: int = 90, classes: int = 3) -> KNNMonitor:
    sources = [
        ArraySource(name, np.zeros((n, 8, 8), np.uint8), np.arange(n) % classes, [*"abcdefghij"[:classes]])
        for name, n in (("train", num_train), ("val", 10))
    ]
    return KNNMonitor(tuple(sources), 32, (0.5,) * 3, (0.5,) * 3, None, epochs=1, device="cpu")


def write_log(folder, *lines) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def summarize(folder, knn, problems=()):
    return summary(folder, "vit_tiny", 4, 32, "/my images", None, knn, [folder / "views.png"], list(problems))


def test_summary_names_what_was_learned_and_the_files(tmp_path):
    write_log(
        tmp_path,
        {"step": 0, "epoch": 0, "knn_top1": 30.0},
        {"step": 10, "epoch": 0, "loss": None},  # every step was left out
        {"step": 20, "epoch": 0, "loss": 6.2},
        {"step": 30, "epoch": 0, "loss": 5.1},
        {"step": 30, "epoch": 1, "knn_top1": 42.5},
    )
    text = summarize(tmp_path, make_monitor(), problems=["step 30: COLLAPSE"])
    assert "loss 6.200 at step 20, loss 5.100 at step 30" in text
    assert "k-NN on val: 10 images, 3 classes: 30.0 % after 0 steps, 42.5 % after 30 steps (chance 33.3 %)" in text
    for shown in ("step 30: COLLAPSE", tmp_path / "checkpoint.pth", tmp_path / "log.txt", tmp_path / "views.png"):
        assert str(shown) in text


def test_summary_of_a_run_without_labels_or_finite_steps(tmp_path):
    write_log(tmp_path, {"step": 10, "epoch": 0, "loss": None})
    text = summarize(tmp_path, SimpleNamespace(disabled_reason="the images have no classes"))
    assert "no k-NN evaluation: the images have no classes" in text
    assert "Problems" not in text


@pytest.mark.parametrize("arch", ["vit_tiny", "xcit_nano_12_p16", "resnet18"])
@pytest.mark.parametrize("data_path", [None, "/my images"])
@pytest.mark.parametrize("num_train", [None, 90, 500])
def test_next_commands_are_understood_and_fit_the_run(arch, data_path, num_train, tmp_path):
    knn = make_monitor(num_train) if num_train else SimpleNamespace(disabled_reason="no classes")
    found = {}
    for line in next_commands(tmp_path, arch, 4, 32, data_path, None, knn):
        _, script, *arguments = shlex.split(line)
        found[script] = importlib.import_module(f"dino.{script[:-3]}").parse_args(arguments)
    assert ("eval_knn.py" in found) == ("eval_linear.py" in found) == (num_train is not None)
    assert ("visualize_attention.py" in found) == (arch != "resnet18")
    del found["main_dino.py"]
    for args in found.values():
        assert args.arch == arch and args.pretrained_weights == str(tmp_path / "checkpoint.pth")
        assert args.data_path == data_path
        assert args.patch_size == 4 or arch != "vit_tiny"
    if num_train and data_path:
        assert found["eval_knn.py"].image_size == found["eval_linear.py"].image_size == 32
        assert max(found["eval_knn.py"].nb_knn) == (20 if num_train == 90 else 200)
        assert found["eval_linear.py"].num_labels == 3
