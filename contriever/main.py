"""Alias of ``train.py``: every method folder can be started as ``python main.py``."""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from contriever.train import get_args_parser, main

__all__ = ["get_args_parser", "main"]

if __name__ == "__main__":
    main()
