"""Every script ends with one line for a mistake of its user."""

import importlib

import pytest

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
def test_a_path_that_does_not_exist_is_one_line_and_exit_code_2(script, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{script}.py", *COMMANDS[script]])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"dino.{script}").main()
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and NOWHERE in printed
