"""Mistakes name the nearest flag, the file and the key; YAML files set defaults, and the command line wins."""

import argparse
import ast
import importlib
import re
from pathlib import Path

import pytest

import dino.main_dino
from shared.run.flags import Parser, bool_flag, parse_with_embedded_defaults
from shared.run.packages import need_packages
from shared.run.yaml_config import parse_args_with_config, read_config, write_config

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = [file.parent for file in ROOT.glob("*/__init__.py") if file.parent.name != "tests"]
FILES = [file for folder in FOLDERS for file in sorted(folder.rglob("*.py"))]
SCRIPTS = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in FILES if "def get_args_parser" in f.read_text()]


def parser() -> Parser:
    parser = Parser("Train a network.\n\nMore about it.")
    parser.add_argument("--data_path", default=None)
    parser.add_argument("--epochs", type=int, default=100, help="passes over the images")
    parser.add_argument("--batch_size_per_gpu", type=int, default=64, help="images per process")
    parser.add_argument("--saveckp_minutes", type=float, default=15)
    return parser


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch_s", "3"], "unrecognized arguments: --epoch_s 3; did you mean --epochs? (--help lists all flags)"),
        (["--batchsize_per_gpu=3"], "did you mean --batch_size_per_gpu?"),
        (["--nothing-like-it", "3"], "unrecognized arguments: --nothing-like-it 3 (--help"),
        (["--small_data"], "unrecognized arguments: --small_data (--help"),  # of other scripts, and no --val_path
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
    for minutes, message in (("-1", "-1.0 is less than 0"), ("nan", "nan is no number")):
        with pytest.raises(SystemExit):
            parse_with_embedded_defaults(parser(), ["--saveckp_minutes", minutes], {}, {})
        assert f"--saveckp_minutes {message}" in capsys.readouterr().err


# --- YAML files -------------------------------------------------------------------------------------------------------


def small_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fname", default=None)
    add = parser.add_argument_group("optimization").add_argument
    add("--lr", type=float, default=0.5)
    add("--epochs", type=int, default=3)
    add("--scale", type=float, nargs=2, default=(0.1, 1.0))
    add = parser.add_argument_group("meta").add_argument
    add("--model_name", default="deit_small", choices=("deit_small", "deit_base"))
    add("--read_checkpoint", default=None)
    add("--use_bn", type=bool_flag, default=True)
    add("--compile", action="store_true")
    parser.add_argument_group("meta").add_argument("--sizes", type=int, nargs="+", default=[1])  # a second "meta"
    return parser


@pytest.fixture
def write(tmp_path):
    def write_file(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write_file


def test_the_file_sets_defaults_and_the_command_line_wins(write):
    path = write("optimization:\n  lr: 1e-6\n  epochs: 7\nmeta:\n  use_bn: false\n  compile: true\n  sizes: [4, 5]\n")
    args = parse_args_with_config(small_parser(), ["--fname", path, "--epochs", "9"])
    assert (args.lr, args.epochs, args.use_bn, args.compile, args.sizes) == (1e-6, 9, False, True, [4, 5])
    assert args.model_name == "deit_small"  # not in the file


@pytest.mark.parametrize(
    ("text", "value"), [("1e-6", 1e-6), ("2E5", 2e5), ("-1.5e+3", -1500), ("3", 3.0), ("-2", -2.0)]
)
def test_numbers_are_read_as_in_python(write, text, value):
    lr = read_config(write(f"lr: {text}"), small_parser())["lr"]
    assert lr == value and type(lr) is float


def test_null_is_a_value_of_flags_that_may_have_none(write):
    assert read_config(write("meta:\n  read_checkpoint: null\n"), small_parser()) == {"read_checkpoint": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimization:\n  epoch: 3\n", "optimization.epoch: no such key; is epochs meant?"),
        ("optimization:\n  use_bn: true\n", "optimization.use_bn: no such key"),
        ("optimisation:\n  epochs: 3\n", "unknown section 'optimisation'"),
        ("momentum: 3\n", "momentum: no such key"),
        ("help: true\n", "help: no such key"),
        ("epochs: 3.5\n", "epochs: expected a whole number, got the number 3.5"),
        ("epochs: '3'\n", "epochs: expected a whole number, got the text '3'"),
        ("epochs: true\n", "epochs: expected a whole number, got true or false True"),
        ("lr: fast\n", "lr: expected a number, got the text 'fast'"),
        ("lr:\n", "lr: has no value, expected a number"),
        ("lr: [1, 2]\n", "lr: expected a number, got a list"),
        ("use_bn: 1\n", "use_bn: expected true or false, got the number 1"),
        ("compile:\n", "compile: has no value, expected true or false"),
        ("model_name: 3\n", "model_name: expected a text, got the number 3"),
        ("model_name: vgg\n", "model_name: 'vgg' is none of deit_small, deit_base"),
        ("scale: 0.5\n", "scale: expected a list of a number, got the number 0.5"),
        ("scale: [0.5]\n", "scale: expected 2 values, got 1"),
        ("sizes: []\n", "sizes: expected at least one value, got none"),
        ("optimization:\n  lr:\n    start: 1\n", "optimization.lr: expected a number, got a section"),
        ("lr: 1\nlr: 2\n", "'lr' is there twice"),
        ("lr: 1\noptimization:\n  lr: 2\n", "optimization.lr: is there twice"),
        ("- lr\n", "expected keys with values, got a list"),
        ("", "expected keys with values, got nothing"),
        ("lr: [1\n", "is not a YAML file that can be used"),
        ("lr: !!python/object/apply:os.getcwd []\n", "is not a YAML file that can be used"),
    ],
)
def test_a_mistake_names_the_file_and_the_key(write, text, message):
    path = write(text)
    with pytest.raises(ValueError) as error:
        read_config(path, small_parser())
    assert message in str(error.value) and path in str(error.value)


def test_a_mistake_stops_the_program_with_one_line(write, tmp_path, capsys):
    for path, message in ((write("epoch: 3"), "is epochs meant?"), (str(tmp_path / "no.yaml"), "No such file")):
        with pytest.raises(SystemExit) as stop:
            parse_args_with_config(small_parser(), ["--fname", path])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_written_file_gives_the_same_flags_again(tmp_path):
    path = tmp_path / "params.yaml"
    args = small_parser().parse_args(["--lr", "1e-7", "--use_bn", "off", "--compile", "--sizes", "2", "3"])
    write_config(path, args, small_parser())
    again = vars(parse_args_with_config(small_parser(), ["--fname", str(path)]))
    assert {**again, "fname": None, "scale": tuple(again["scale"])} == vars(args)


# --- Packages ---------------------------------------------------------------------------------------------------------


def test_every_missing_package_is_named_as_pip_knows_it():
    message = "^detection needs packages that are not installed: pip install one-package other$"
    with pytest.raises(ModuleNotFoundError, match=message):
        need_packages("detection", no_such_module="one-package", torch="torch", nor_this_one="other")
