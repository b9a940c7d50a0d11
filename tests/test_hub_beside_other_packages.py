"""torch.hub beside a user's own packages of our names, and two copies of the repository in one process."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
USE = """
import sys
ours, copied, cache, order = sys.argv[1:]
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
if order == "before":
    import shared, dino
import torch
torch.hub.set_dir(cache)
names = torch.hub.list("me/papers:main", trust_repo=True)  # these two know no local folders
assert len(names) >= 46 and torch.hub.help("me/papers:main", "dino_vits16", trust_repo=True).startswith("ViT-S/16")
def load(root, name, **options):
    return torch.hub.load(root, name, source="local", pretrained=False, **options).eval()
a, b = (load(root, "dino_vits16", img_size=[32]) for root in (ours, copied))
assert type(a) is not type(b) and type(a) is type(load(ours, "dino_vits16", img_size=[32]))
import shared, dino, shared.extra
assert shared.MINE and dino.MINE
images = torch.randn(2, 3, 32, 32)
if order == "after":  # both orders are the same from here on
    import pickle
    load(ours, "dino_resnet50")  # imports timm and torchvision, and files of ours, when it is called
    for other in (pickle.loads(pickle.dumps(a)), torch.compile(a, backend="eager")):
        torch.testing.assert_close(other(images), a(images))
b.load_state_dict(a.state_dict())
torch.testing.assert_close(b(images), a(images))
assert ours not in sys.path and not any(name.split(".")[0] in ("swav", "msn", "hubconf") for name in sys.modules)
"""


@pytest.mark.parametrize("order", ["before", "after"])
def test_packages_of_our_names_stay_the_users(order, tmp_path):
    for name in ("shared", "dino"):
        (tmp_path / "user" / name).mkdir(parents=True)
        (tmp_path / "user" / name / "__init__.py").write_text("MINE = True\n")
    (tmp_path / "user" / "shared" / "extra.py").touch()
    for part in ("shared", "dino"):
        shutil.copytree(ROOT / part, tmp_path / "copied" / part)
    shutil.copy(ROOT / "hubconf.py", tmp_path / "copied")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "me_papers_main").symlink_to(ROOT)
    arguments = [str(ROOT), str(tmp_path / "copied"), str(tmp_path / "hub"), order]
    subprocess.run([sys.executable, "-c", USE, *arguments], cwd=tmp_path / "user", check=True, env={"PYTHONPATH": ""})


def test_import_needs_neither_torchvision_nor_timm():
    code = "import torch, sys, hubconf; print([name for name in ('torchvision', 'timm', 'cv2') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_file_is_short():
    assert len((ROOT / "hubconf.py").read_text().splitlines()) <= 60
