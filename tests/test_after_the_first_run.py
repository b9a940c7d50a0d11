"""The hour after the first run, from an empty folder: each step is a command of the README, in a process of its own."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import tifffile
from PIL import Image

from tests.processes import run_script
from tests.shared.photographs import encoded, photograph

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SIDE, PHOTOS, COPIES = 64, 160, 40
FAST = "--device cpu --num_workers 0"
MODULE = f"""
import numpy as np
from pathlib import Path
from PIL import Image

class Photos:
    def __init__(self, folder):
        self.files = sorted(Path(folder).iterdir())
        self.targets, self.classes = [i % 2 for i in range(len(self.files))], ["even", "odd"]
    def __len__(self):
        return len(self.files)
    def __getitem__(self, i):
        return Image.open(self.files[i]).resize(({SIDE}, {SIDE})), self.targets[i]

class Endless:
    def __getitem__(self, i):
        return Image.new("RGB", (8, 8))

def photos(split):
    if split == "val":
        raise ValueError("no val part")
    return Photos(Path(__file__).parent / "photos")

def endless(split):
    return Endless()
"""
LOAD = {
    "timm": """
import timm
options = {"num_classes": 0, "patch_size": 8, "img_size": 64}
network = timm.create_model("vit_tiny_patch16_224", checkpoint_path=file, **options).eval()
found = network(torch.from_numpy(images)).detach().numpy()
""",
    "onnxruntime": """
import onnxruntime
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
(found,) = session.run(["features"], {"images": images})
session.run(["features"], {"images": np.zeros((1, 3, 96, 72), dtype=np.float32)})
""",
    "torch.hub": """
network = torch.hub.load(repository, "run", file, source="local")
found = network(torch.from_numpy(images)).numpy()
""",
}


def kind_of(number: int) -> str:
    """What a person would say of a photograph: how bright it is."""
    return "bright" if photograph(1000 + number, SIDE, SIDE).mean() > 128 else "dark"


def write_photos(folder: Path) -> None:
    """160 photographs without labels and copies of 40 of them: JPEG, smaller by an eighth, or cropped by a pixel."""
    folder.mkdir()
    for i in range(PHOTOS):
        image = Image.fromarray(photograph(1000 + i, SIDE, SIDE))
        (folder / f"{i:03}a.png").write_bytes(encoded(image, "PNG"))
        changed = (image, image.resize((56, 56), Image.Resampling.BICUBIC), image.crop((1, 1, SIDE, SIDE)))[i % 3]
        if i < COPIES:
            (folder / f"{i:03}b.jpg").write_bytes(encoded(changed, "JPEG", quality=75 if i % 3 == 0 else 95))


def step(command: str, cwd: Path, code: int = 0) -> str:
    """What a command prints; its script, with as many of its words as are no names of files, stands in the README."""
    words = shlex.split(command)
    assert (" ".join(words[:2]) if words[0] == "-m" else Path(words[0]).name) in README, command
    words[0] = str(ROOT / words[0]) if words[0].endswith(".py") else words[0]
    if words[0] == "-m":  # modules are found from the repository
        words, cwd = [word.replace("HERE", str(cwd)) for word in words], ROOT
    done = run_script(*words, cwd=cwd, timeout_s=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(file: Path) -> list[dict[str, str]]:
    with open(file) as opened:
        return list(csv.DictReader(opened))


@pytest.mark.slow
def test_an_hour_from_an_empty_folder(tmp_path):
    write_photos(tmp_path / "photos")
    images = f"--data_path HERE/photos {FAST}"
    train = "--small_data --arch vit_tiny --epochs 2 --pictures off"
    step(f"dino/main_dino.py --data_path photos {train} {FAST} --output_dir run", tmp_path)

    # near-duplicates: no training needed, what matters is that a network keeps what it sees
    extract = "-m shared.evaluation.extract_features"
    step(f"{extract} dino random --arch vgg11 --image_size {SIDE} {images} --out HERE/all.parquet", tmp_path)
    step("-m shared.evaluation.near_duplicates HERE/all.parquet --threshold 0.99 --out HERE/duplicates.csv", tmp_path)
    groups: dict[str, set[str]] = {}
    for row in rows(tmp_path / "duplicates.csv"):
        groups.setdefault(row["group"], set()).add(Path(row["path"]).name[:3])
    assert len(groups) >= 38 and all(len(names) == 1 for names in groups.values())

    # features of the run, clusters, labels for all from 30
    printed = step(f"{extract} HERE/run {images} --out HERE/features.parquet", tmp_path)
    assert "entries of the network matched" in printed and "200 features of 192 dimensions" in printed
    step("-m shared.evaluation.clusters HERE/features.parquet --clusters 5 --out HERE/clusters", tmp_path)
    assert len(list((tmp_path / "clusters" / "sheets").iterdir())) == 5
    labels = [f"{i:03}a.png,{kind_of(i)}\n" for i in range(30)]
    (tmp_path / "labels.csv").write_text("image,label\n" + "".join(labels))
    classify = "-m shared.evaluation.classify HERE/all.parquet --labels HERE/labels.csv --out HERE/predictions.csv"
    assert "30 labelled images of 2 classes, 170 others" in step(classify, tmp_path)
    predicted = [
        (kind_of(int(Path(row["image"]).name[:3])), row["label"]) for row in rows(tmp_path / "predictions.csv")
    ]
    assert len(predicted) == 170 and sum(truth == label for truth, label in predicted) > 110
    assert len(rows(tmp_path / "label_next.csv")) == 16

    # one's own Dataset
    (tmp_path / "my_data.py").write_text(MODULE)
    step(f"dino/main_dino.py --data_path my_data:photos {train} {FAST} --epochs 1 --output_dir own", tmp_path)

    # five channels of a 12-bit camera
    (tmp_path / "tiffs").mkdir()
    for i in range(24):
        values = np.random.default_rng(i).integers(0, 4096, (5, SIDE, SIDE)).astype(np.uint16)
        tifffile.imwrite(tmp_path / "tiffs" / f"{i}.tif", values, photometric="minisblack")
    step(f"dino/main_dino.py --data_path tiffs --in_chans 5 {train} {FAST} --epochs 1 --output_dir run5", tmp_path)
    step(f"{extract} HERE/run5 --data_path HERE/tiffs {FAST} --out HERE/five.parquet", tmp_path)
    step("-m dino.export --pretrained_weights HERE/run5 --output_dir HERE/out5", tmp_path)
    with safetensors.safe_open(tmp_path / "out5/vit_tiny.safetensors", "pt") as file:
        fed = {name: json.loads(file.metadata()[name]) for name in ("mean", "std", "low", "high")}
    assert all(len(values) == 5 for values in fed.values()) and max(fed["high"]) <= 4095

    # export, and what reads it in fresh processes
    step("-m dino.export --pretrained_weights HERE/run --output_dir HERE/out", tmp_path)
    assert "--small_data True" in (tmp_path / "out" / "vit_tiny_card.md").read_text()
    expected = {"timm": "out/vit_tiny_timm.pth", "onnxruntime": "out/vit_tiny.onnx", "torch.hub": "run"}
    found = {}
    for name, file in expected.items():
        code = f"import json, numpy as np, torch\nrepository, file = {str(ROOT)!r}, {str(tmp_path / file)!r}\n"
        code += "images = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)\n"
        code += f"{LOAD[name]}\nprint(json.dumps(found[:, :5].tolist()))"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout.splitlines()[-1])
    assert found["timm"][0] == pytest.approx(found["onnxruntime"][0], abs=1e-3)
    assert found["timm"][0] == pytest.approx(found["torch.hub"][0], abs=1e-3)

    # bad input is one sentence
    for command, message in (
        (
            "-m shared.evaluation.near_duplicates HERE/all.parquet HERE/features.parquet --out HERE/d.csv",
            r"features.parquet has weights_crc32 \d+, .*all.parquet \d+: features of different networks",
        ),
        (classify.replace("labels.csv", "wrong.csv"), r"wrong.csv, line 2: 'none.png' is not among the images"),
        (f"dino/main_dino.py --data_path my_data:endless {train} {FAST}", "Endless is no map-style data set"),
    ):
        (tmp_path / "wrong.csv").write_text("000a.png,dark\nnone.png,bright\n")
        printed = step(command, tmp_path, code=2)
        assert re.search(rf"^error: .*{message}", printed, re.M) and "Traceback" not in printed
