"""torch.hub beside a user's own packages of our names, and two copies of the repository in one process."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import run_script

ROOT = Path(__file__).resolve().parents[1]
USE = """
import sys
ours, copied, cache, order = sys.argv[1:]
if order != "after":
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
others = [b]
if order == "after":  # both orders are the same from here on
    import pickle
    load(ours, "dino_resnet50")  # imports timm and torchvision, and files of ours, when it is called
    others.append(pickle.loads(pickle.dumps(a)))
elif order == "compiled":
    others.append(torch.compile(a, backend="eager"))
b.load_state_dict(a.state_dict())
for other in others:
    torch.testing.assert_close(other(images), a(images))
assert ours not in sys.path and not any(name.split(".")[0] in ("swav", "msn", "hubconf") for name in sys.modules)
"""


@pytest.mark.parametrize("order", ["before", "after", pytest.param("compiled", marks=pytest.mark.slow)])
def test_packages_of_our_names_stay_the_users(order, tmp_path):
    for name in ("shared", "dino"):
        (tmp_path / "user" / name).mkdir(parents=True)
        (tmp_path / "user" / name / "__init__.py").write_text("MINE = True\n")
        shutil.copytree(ROOT / name, tmp_path / "copied" / name)
    (tmp_path / "user" / "shared" / "extra.py").touch()
    (tmp_path / "user" / "use.py").write_text(USE)
    shutil.copy(ROOT / "hubconf.py", tmp_path / "copied")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "me_papers_main").symlink_to(ROOT)
    done = run_script("use.py", ROOT, tmp_path / "copied", tmp_path / "hub", order, cwd=tmp_path / "user")
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_needs_torch_alone():
    others = "torchvision timm cv2 simplejpeg sklearn faiss submitit matplotlib".split()
    code = f"import torch, sys, hubconf; print([name for name in {others} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
