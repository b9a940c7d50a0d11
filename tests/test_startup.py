import subprocess
import sys
from pathlib import Path

MAINS = (
    "dino.main_dino",
    "swav.main_swav",
    "swav.main_deepclusterv2",
    "msn.main",
    "paws.paws_train",
    "deepercluster.main",
)
SLOW_TO_IMPORT = {"torchvision", "timm", "sklearn", "scipy", "matplotlib", "pandas", "faiss", "torch._dynamo"}


def test_scripts_import_nothing_slow_before_they_need_it():
    code = f"import sys, {', '.join(MAINS)}; print(*(set({SLOW_TO_IMPORT}) & set(sys.modules)))"
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
