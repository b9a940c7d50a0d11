import ast
import importlib
import re
from pathlib import Path

import pytest

import dino.main_dino
from shared.run.flags import Parser, parse_with_embedded_defaults

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = [file.parent for file in ROOT.glob("*/__init__.py") if file.parent.name != "tests"]
FILES = [file for folder in FOLDERS for file in sorted(folder.rglob("*.py"))]
SCRIPTS = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in FILES if "def get_args_parser" in f.read_text()]


def parser() -> Parser:
    parser = Parser("Train a network.\n\nMore about it.")
    parser.add_argument("--data_path", default=None)
    parser.add_argument("--epochs", type=int, default=100, help="passes over the images")
    parser.add_argument("--batch_size_per_gpu", type=int, default=64, help="images per process")
    return parser


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch_s", "3"], "unrecognized arguments: --epoch_s 3; did you mean --epochs? (--help lists all flags)"),
        (["--batchsize_per_gpu=3"], "did you mean --batch_size_per_gpu?"),
        (["--nothing-like-it", "3"], "unrecognized arguments: --nothing-like-it 3 (--help"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_flag(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        parser().parse_args(arguments)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1 and printed.startswith("error: ") and message in printed


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_typo_is_named_with_the_nearest_flag_even_where_a_flag_is_missing(name, capsys):
    script = importlib.import_module(name).get_args_parser()
    flags = [action.option_strings[-1] for action in script._actions if len((action.option_strings or [""])[-1]) > 5]
    flag = max(flags, key=len)
    typo = flag[:-2] + flag[-1] + flag[-2] + "q"
    with pytest.raises(SystemExit) as end:
        script.parse_args([typo, "1"])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1
    assert f"unrecognized arguments: {typo}" in printed and f"did you mean {flag}?" in printed


def test_no_script_has_a_parser_of_its_own():
    for file in FILES:
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if ast.unparse(call.func).endswith("ArgumentParser")], file


def test_help_shows_the_defaults_and_the_first_paragraph(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    printed = capsys.readouterr().out
    assert "passes over the images (default: 100)" in printed
    assert "Train a network." in printed and "More about it" not in printed


def test_help_begins_with_the_flags_that_people_use_and_shows_each_once(capsys):
    script = dino.main_dino.get_args_parser()
    script.print_help()
    usage, first = capsys.readouterr().out.split("most used:\n")
    assert usage.count("--") == 0 and "[flags]" in usage
    first, *others = first.split("\n\n")
    names = re.findall(r"^  (--\w+)", first, re.MULTILINE)
    assert names[:4] == ["--data_path", "--val_path", "--small_data", "--arch"] and len(names) == 10
    shown = re.findall(r"^  (?:-h, )?(--[\w-]+)", "\n".join([first, *others]), re.MULTILINE)
    flags = [[option for option in action.option_strings if len(option) > 2] for action in script._actions]
    assert sorted(shown) == sorted(options[0] for options in flags)


def test_without_data_the_defaults_are_those_of_the_embedded_ones_and_a_set_flag_stays():
    defaults, minimum = {"epochs": 3, "batch_size_per_gpu": 8}, {"epochs": 1}
    args = parse_with_embedded_defaults(parser(), ["--epochs", "5"], defaults, minimum)
    assert (args.epochs, args.batch_size_per_gpu) == (5, 8)
    args = parse_with_embedded_defaults(parser(), ["--data_path", "images"], defaults, minimum)
    assert (args.epochs, args.batch_size_per_gpu) == (100, 64)


def test_a_value_below_its_minimum_is_named(capsys):
    with pytest.raises(SystemExit):
        parse_with_embedded_defaults(parser(), ["--epochs", "0"], {}, {"epochs": 1})
    assert "--epochs 0 is less than 1" in capsys.readouterr().err
