"""Every script understands its published commands, and ends with one line for a mistake of its user."""

import importlib

import pytest

from tests.command_lines import error_of

NOWHERE = "/no/such/place"
RANDOM = ("--arch", "vit_tiny", "--patch_size", "16", "--pretrained_weights", "random", "--device", "cpu")
COMMANDS = {
    "main_dino": ("--device", "cpu", "--data_path", NOWHERE),
    "eval_knn": (*RANDOM, "--data_path", NOWHERE),
    "eval_linear": (*RANDOM, "--data_path", NOWHERE),
    "eval_image_retrieval": (*RANDOM, "--data_path", NOWHERE),
    "eval_copy_detection": (*RANDOM, "--data_path", NOWHERE),
    "eval_video_segmentation": (*RANDOM, "--data_path", NOWHERE),
    "visualize_attention": (*RANDOM, "--image_path", NOWHERE),
    "video_generation": (*RANDOM, "--input_path", NOWHERE),
    "export": ("--pretrained_weights", NOWHERE),
}


@pytest.mark.parametrize("script", COMMANDS)
def test_a_path_that_does_not_exist_is_one_line(script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    printed = error_of(importlib.import_module(f"dino.{script}").main, *COMMANDS[script])
    assert printed.startswith("error: ") and printed.count("\n") == 1 and NOWHERE in printed
