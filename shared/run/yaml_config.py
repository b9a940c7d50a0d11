"""YAML files that set the defaults of a script's flags.

    meta:
      model_name: deit_small
    optimization:
      epochs: 800
      final_lr: 1.0e-6

A key is the name of a flag, a section the title of its group in ``--help``; keys outside of sections work as well. What
the command line says wins over the file. A key that no flag has, or a value of another type than the flag's, is an
error that names the file and the key.
"""

import argparse
import difflib
import re
from pathlib import Path

import yaml

from .flags import bool_flag


class _Loader(yaml.SafeLoader):
    """The safe loader, with 1e-6 a number (YAML 1.2) and a key that is written twice an error."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_args_with_config(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line with the defaults of the YAML file that it names as ``--fname``, if it does.

    The parser's own defaults (see ``set_defaults``) give way to the file's values. A mistake in the file ends the
    program as one on the command line does, with exit code 2.
    """
    if path := parser.parse_args(arguments).fname:
        try:
            parser.of_file = read_config(path, parser)
            parser.set_defaults(**parser.of_file)
        except (ValueError, OSError) as error:
            parser.error(f"--fname: {error}")
    return parser.parse_args(arguments)


def read_config(path: str | Path, parser: argparse.ArgumentParser) -> dict:
    """Values of a YAML file by the destination of their flag in ``parser``.

    Raises:
        ValueError: For a file that is no YAML, an unknown key or section, a key that is there twice, or a value that is
            not of the flag's type or none of its choices.
        OSError: If the file cannot be read.
    """
    try:
        tree = _load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file that can be used: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected keys with values, got {_kind(tree)}")
    sections: dict[str, list[argparse.Action]] = {}
    for group in parser._action_groups:  # several may have one title
        sections.setdefault(group.title, []).extend(group._group_actions)
    values = {}
    for key, value in tree.items():
        inside = value if isinstance(value, dict) else {key: value}
        actions = parser._actions
        if isinstance(value, dict):
            if key not in sections:
                raise ValueError(f"{path}: unknown section {key!r}; there are {', '.join(map(str, sections))}")
            actions = sections[key]
        for name, item in inside.items():
            where = f"{path}: {key}.{name}" if isinstance(value, dict) else f"{path}: {name}"
            action = next((action for action in actions if f"--{name}" in action.option_strings), None)
            if action is None or action.dest == "help":
                raise ValueError(f"{where}: no such key{_near(name, actions)}")
            if action.dest in values:
                raise ValueError(f"{where}: is there twice")
            values[action.dest] = _checked(item, action, where)
    return values


def _load(text: str):
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def write_config(path: str | Path, args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Write the flags in their sections; reading the file back gives the same values."""
    tree: dict[str, dict] = {}
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.option_strings and hasattr(args, action.dest):
                value = getattr(args, action.dest)
                section = tree.setdefault(group.title, {})
                section[action.option_strings[0].lstrip("-")] = list(value) if isinstance(value, tuple) else value
    Path(path).write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def _checked(value, action: argparse.Action, where: str):
    """``value`` if ``action`` could have stored it; a list for flags that take several values."""
    if value is None:
        if action.default is not None:
            raise ValueError(f"{where}: has no value, expected {_expected(action)[0]}")
        return None
    if action.nargs in (None, 0, "?") and not isinstance(action, argparse._AppendAction):
        return _checked_item(value, action, where)
    if action.nargs == "+" and not isinstance(value, list | dict):
        value = [value]  # as on the command line, where one value needs no brackets
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list of {_expected(action)[0]}, got {_kind(value)}")
    if isinstance(action.nargs, int) and len(value) != action.nargs:
        raise ValueError(f"{where}: expected {action.nargs} values, got {len(value)}")
    if action.nargs == "+" and not value:
        raise ValueError(f"{where}: expected at least one value, got none")
    return [_checked_item(item, action, where) for item in value]


def _checked_item(value, action: argparse.Action, where: str):
    expected, types = _expected(action)
    if type(value) not in types:
        raise ValueError(f"{where}: expected {expected}, got {_kind(value)}")
    if action.type is float:
        value = float(value)
    elif action.type not in (None, str, int, bool_flag):
        try:
            value = action.type(value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{where}: {value!r}: {error}") from error
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"{where}: {value!r} is none of {', '.join(map(str, action.choices))}")
    return value


def _expected(action: argparse.Action) -> tuple[str, tuple[type, ...]]:
    """What a value in the file has to be: in words, and its types."""
    if action.nargs == 0 or action.type is bool_flag:
        return "true or false", (bool,)
    if action.type is int:
        return "a whole number", (int,)
    if action.type is float:
        return "a number", (float, int)
    return "a text", (str,)


def _kind(value) -> str:
    if value is None:
        return "nothing"
    names = {bool: "true or false", int: "the number", float: "the number", str: "the text", list: "a list"}
    name = names.get(type(value), "a section" if isinstance(value, dict) else type(value).__name__)
    return f"{name} {value!r}" if type(value) in (int, float, str, bool) else name


def _near(name, actions: list[argparse.Action]) -> str:
    """A hint to the key that was meant."""
    known = [option.lstrip("-") for action in actions for option in action.option_strings]
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; is {close[0]} meant?" if close else ""
