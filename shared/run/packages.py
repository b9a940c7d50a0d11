"""Packages that only one method needs."""

from importlib.util import find_spec


def need_packages(who: str, **names: str) -> None:
    """Say what has to be installed, all at once.

    Args:
        who: Needs them.
        names: What ``pip install`` calls each one, by the name of its module.

    Raises:
        ModuleNotFoundError: If one is missing.
    """
    missing = [name for module, name in names.items() if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(f"{who} needs packages that are not installed: pip install {' '.join(missing)}")
