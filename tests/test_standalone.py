"""Files that people lift out of this repository: a network alone, or with the parts that several networks share."""

import ast
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PARTS = "shared/networks/vit_parts.py"


def imported_modules(path: Path) -> set[str]:
    """Modules that a file imports anywhere, in functions too; ``.`` for its siblings."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            modules.add(".")
        elif isinstance(node, ast.ImportFrom) and node.module == "shared.networks":
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    return modules


def foreign_packages(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules} - {"torch", *sys.stdlib_module_names}


def load_alone(path: Path, folder: Path) -> ModuleType:
    """A copy of the file in ``folder``, with its ``shared/networks/vit_parts.py`` if it imports that, imported.

    Raises:
        AssertionError: If the file needs more than torch, Python itself and that file, or that one more than torch.
    """
    modules = imported_modules(path)
    foreign = foreign_packages(modules - {"shared.networks.vit_parts"})
    assert not foreign, f"{path} imports {', '.join(sorted(foreign))}"
    copied = shutil.copy(path, folder)
    if "shared.networks.vit_parts" in modules:
        foreign = foreign_packages(imported_modules(ROOT / PARTS))
        assert not foreign, f"{PARTS} imports {', '.join(sorted(foreign))}"
        (folder / PARTS).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / PARTS, folder / PARTS)
    spec = importlib.util.spec_from_file_location(f"copied_{path.stem}", copied)
    module = importlib.util.module_from_spec(spec)
    elsewhere = [str(folder), *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
    with mock.patch.dict(sys.modules), mock.patch.object(sys, "path", elsewhere):
        for name in [name for name in sys.modules if name.partition(".")[0] == "shared"]:
            del sys.modules[name]  # those of the repository
        spec.loader.exec_module(module)
        ours = [m.__file__ for name, m in sys.modules.items() if name.startswith("shared.networks.")]
        assert ours in ([], [str(folder / PARTS)]), ours
    return module


NETWORKS = {  # file: a network of it, the shape of its input and the length of its output
    "deepcluster/convnets.py": (lambda file: file.alexnet(out=5, img_size=64), (3, 64, 64), 5),
    "deepercluster/vgg16.py": (lambda file: file.VGG16(sobel=True, width=2, img_size=32), (3, 32, 32), 128),
    "dino/vision_transformer.py": (lambda file: file.vit_tiny(), (3, 32, 32), 192),
    "msn/vision_transformer.py": (lambda file: file.build("deit_micro"), (3, 16, 16), 96),
    "paws/heads.py": (lambda file: file.projection_head(8, 4), (8,), 4),
    "paws/resnet.py": (lambda file: file.ResNet((1, 1, 1, 1), base_planes=8), (3, 32, 32), 256),
    "paws/wide_resnet.py": (lambda file: file.WideResNet(10, 1), (3, 16, 16), 64),
    "resmlp/resmlp_models.py": (lambda file: file.resmlp_12(img_size=16, embed_dim=8, depth=1), (3, 16, 16), 1000),
    "seer/regnet.py": (lambda file: file.RegNet(file.SIZES["regnet_micro"]), (3, 32, 32), 128),
    "swav/resnet50.py": (lambda file: file.ResNet([1, 1, 1, 1], width_per_group=8), (3, 32, 32), 256),
    "vit22b/scaled_vit.py": (lambda file: file.ScaledViT(32, 1, 64, 2, 8, 32), (3, 32, 32), 32),
    "xcit/cross_covariance_transformer.py": (lambda file: file.xcit_nano_12_p16(), (3, 32, 32), 1000),
}


@pytest.mark.parametrize("file", NETWORKS)
def test_the_file_of_a_network_needs_torch_and_the_shared_parts_at_most(file, tmp_path):
    build, shape, length = NETWORKS[file]
    network = build(load_alone(ROOT / file, tmp_path)).eval()
    assert network(torch.zeros(1, *shape)).shape == (1, length)
