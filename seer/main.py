"""Alias of ``main_seer.py``: every method folder can be started as ``python main.py``."""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from seer.main_seer import main

if __name__ == "__main__":
    main()
