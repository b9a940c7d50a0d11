"""Scripts as Python calls."""

import sys

import pytest
import torch

from shared.train import command_line, train
from tests.dino import tiny


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    from dino import main_dino

    for name in ("build_backbone", "DINOHead"):
        monkeypatch.setattr(main_dino, name, getattr(main_dino, name))
    tiny.shrink_networks()


def test_a_call_is_the_command(tmp_path):
    from dino import main_dino

    words = [*tiny.FLAGS.split(), "--data_path", "digits", "--batch_size_per_gpu", "480", "--use_fp16", "false"]
    main_dino.train_dino(main_dino.parse_args([*words, "--output_dir", str(tmp_path / "command")]))
    before = list(sys.argv)
    flags = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    flags |= {"batch_size_per_gpu": 480, "use_fp16": False, "global_crops_scale": (0.4, 1.0), "cache": None}
    train("dino", **flags, compile=False, output_dir=tmp_path / "call")
    assert sys.argv == before
    command, call = (
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["student"] for name in ("command", "call")
    )
    assert all(torch.equal(tensor, call[name]) for name, tensor in command.items())


def test_mistakes_are_value_errors_and_leave_the_process_alive(tmp_path, capsys):
    with pytest.raises(ValueError, match="epoch is no flag; did you mean epochs"):
        train("dino", epoch=3)
    with pytest.raises(ValueError, match=r"dinos is neither a folder with a main\.py"):
        train("dinos")
    with pytest.raises(ValueError, match="no such file or folder"):
        train("dino/main_dino.py", data_path=tmp_path / "none", output_dir=tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match="the flags above are wrong"):
        train("dino", epochs="many")
    assert "--epochs: invalid int value: 'many'" in capsys.readouterr().err


def test_words_are_those_of_the_flags():
    from swav.main_swav import get_args_parser

    flags = {"size_crops": [64, 32], "arch": "resnet18", "use_fp16": True, "compile": True, "queue_length": None}
    expected = "--size_crops 64 32 --arch resnet18 --use_fp16 true --compile"
    assert command_line(get_args_parser(), flags) == expected.split()
