"""The project's scripts as Python calls, from a notebook or a program.

    from shared.train import train

    train("dino", arch="vit_small", data_path="/path/to/images", output_dir="run", epochs=10)
    train("swav/main_deepclusterv2.py", data_path="my_package.data:plates", size_crops=(64, 32))

Keywords are the script's flags. The run is that of the command: the same files, and the same call again resumes it.
Signals save and stop it in the main thread only; in another one it goes on to the end.
"""

import argparse
import difflib
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def train(script: str, **flags) -> None:
    """Run a folder's ``main.py``, or another script of it, in this process.

    Args:
        script: A folder (``dino``) or a script in one (``paws/fine_tune.py``).
        flags: Values of flags: text, numbers, true or false, several in a list. None leaves a flag out.

    Raises:
        ValueError: For an unknown script, flag or value, or what the script calls a mistake of the user.
        Exception: Whatever else stops the run, such as :class:`shared.run.attempt.NotFinite`.
    """
    path = ROOT / (script if script.endswith(".py") else f"{script}/main.py")
    if not path.is_file():
        raise ValueError(f"{script} is neither a folder with a main.py nor a script of {ROOT}")
    main = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)).main
    parser = sys.modules[main.__module__].get_args_parser()  # main.py may be an alias
    before = sys.argv
    sys.argv = [str(path), *command_line(parser, flags)]
    try:
        main()
    except SystemExit as stop:
        if stop.__cause__ is not None:
            raise stop.__cause__ from None
        if stop.code:
            raise ValueError(f"{script}: the flags above are wrong") from None  # the parser has said how
    finally:
        sys.argv = before


def command_line(parser: argparse.ArgumentParser, flags: dict) -> list[str]:
    """The words that say the same to the parser of a script.

    Raises:
        ValueError: If it has no such flag; the nearest one is named.
    """
    actions = {action.dest: action for action in parser._actions}
    words = []
    for name, value in flags.items():
        if name not in actions:
            close = difflib.get_close_matches(name, actions, n=1)
            raise ValueError(f"{name} is no flag" + "".join(f"; did you mean {match}?" for match in close))
        option = actions[name].option_strings[:1]  # none for a positional argument
        if actions[name].nargs == 0:
            words += option if value else []
        elif value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            words += option + [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    return words


if __name__ == "__main__":
    import shared.run.passive_threads  # noqa: F401

    sys.exit("error: this is for calls from Python; a command is that of the script, such as python dino/main.py")
