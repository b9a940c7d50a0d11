"""Entry points of ``torch.hub``: those of every folder's ``hub.py``.

torch.hub.load("/path/to/this/repository", "dino_vits16", source="local") returns a backbone that maps normalised
images (B, 3, H, W) to features (B, D); the entries of ResMLP and XCiT return a classifier. ``pretrained`` may also be a
run of your own, or a file, and the entry ``run`` takes any folder's. The environment variables DINO_WEIGHTS_URL,
SWAV_WEIGHTS_URL, ... (the folder's name in capitals) replace the addresses of the weights.
"""

import importlib as _importlib
import re as _re
import sys as _sys
from importlib import machinery as _machinery
from pathlib import Path as _Path
from types import ModuleType as _ModuleType
from zlib import crc32 as _crc32

dependencies = ["torch", "torchvision", "timm", "numpy", "safetensors"]
_ROOT = _Path(__file__).resolve().parent
# torch.hub reads this file without importing it. Then our folders are parts of a package of this path's own, beside any
# other ``shared`` or ``dino`` of the process; for whoever imports hubconf they go by their names.
_IMPORTED = getattr(_sys.modules.get(__name__), "__dict__", None) is globals()
_PACKAGE = "" if _IMPORTED else f"hub_{_crc32(bytes(_ROOT)):08x}."
_FOLDERS = "|".join(file.parent.name for file in _ROOT.glob("*/__init__.py"))
_IMPORT = _re.compile(rf"^( *(?:from|import) )(?=(?:{_FOLDERS})\b)".encode(), _re.MULTILINE)


class _Loader(_machinery.SourceFileLoader):
    """Reads a file whose imports of our folders are imports from that package."""

    def get_data(self, path):
        return _IMPORT.sub(rb"\1" + _PACKAGE.encode(), super().get_data(path))

    def path_stats(self, path):
        raise OSError("no bytecode: the scripts' own must not be read, nor replaced")


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = _machinery.PathFinder.find_spec(name, path) if name.startswith(_PACKAGE) else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


if _PACKAGE and _PACKAGE[:-1] not in _sys.modules:
    _sys.modules[_PACKAGE[:-1]] = _ModuleType(_PACKAGE[:-1])
    _sys.modules[_PACKAGE[:-1]].__path__ = [str(_ROOT)]
    _sys.meta_path.insert(0, _Finder)


def run(path, **options):
    """The backbone of a run or a file of your own, whichever folder trained it: shared.networks.own_run.load_run."""
    return _importlib.import_module(f"{_PACKAGE}shared.networks.own_run").load_run(path, **options)


for _file in sorted(_ROOT.glob("*/hub.py")):
    globals().update(_importlib.import_module(f"{_PACKAGE}{_file.parent.name}.hub").ENTRIES)
