"""Command lines of the papers' repositories, as published: every value arrives under the name of its flag."""

import importlib
from pathlib import Path

import pytest

from tests.command_lines import assert_values_arrive

PUBLISHED = {
    file.parent.name: importlib.import_module(f"tests.{file.parent.name}.published")
    for file in sorted(Path(__file__).parent.glob("*/published.py"))
}
COMMANDS = [
    (folder, script, command)
    for folder, published in PUBLISHED.items()
    for script, commands in published.COMMANDS.items()
    for command in commands
]


@pytest.mark.parametrize(("folder", "script", "command"), COMMANDS)
def test_a_published_command_is_understood(folder, script, command):
    module, changed = importlib.import_module(f"{folder}.{script}"), getattr(PUBLISHED[folder], "CHANGED", {})
    parser = module.get_args_parser()
    args = getattr(module, "parse_args", parser.parse_args)(command.split())
    assert_values_arrive(parser, command.split(), args, changed.get(script, ()))
