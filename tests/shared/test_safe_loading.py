"""Files that would run code when unpickled never do, and the sources contain no call that would let them."""

import argparse
import ast
import functools
import io
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.weights import UnsafeFileError, load_backbone_weights, safe_load

ROOT = Path(__file__).resolve().parents[2]


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self):
        return self.function, self.arguments, self.state

    def __call__(self):
        """Pickle insists that what a reduction calls is callable; this one is an attack of its own."""


def touch_code(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w')"


def attacks(marker: Path) -> dict[str, object]:
    """Objects whose unpickling creates ``marker``, by a description."""
    code = touch_code(marker)
    command = f"touch {marker}"
    return {
        "os.system": Calls(os.system, command),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "subprocess": Calls(subprocess.check_call, ["touch", str(marker)]),
        "open": Calls(open, str(marker), "w"),
        "chain of reductions": Calls(Calls(getattr, Calls(__import__, "os"), "system"), command),
        "partial": Calls(functools.partial(os.system, command)),
        "map": Calls(list, Calls(map, os.system, [command])),
        "inner pickle": Calls(pickle.loads, pickle.dumps(Calls(os.system, command))),
        "torch's own loader of bytes": Calls(torch.storage._load_from_bytes, legacy_bytes(Calls(os.system, command))),
        "state of a Namespace": Calls(argparse.Namespace, state={"lr": Calls(os.system, command)}),
        "rebuilt tensor type": Calls(torch._tensor._rebuild_from_type_v2, os.system, int, (command,), {}),
        "function from the file": Calls(Calls(eval, f"lambda: {code}")),
    }


def legacy_bytes(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def zip_bytes(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def official_looking(value) -> dict:
    return {
        "student": OrderedDict({"module.backbone.cls_token": torch.zeros(1, 1, 4)}),
        "teacher": OrderedDict({"backbone.cls_token": torch.zeros(1, 1, 4)}),
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.1), "hook": value}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=5e-4),
        "dino_loss": OrderedDict({"center": torch.zeros(1, 4)}),
    }


WRITERS = {
    "zip": zip_bytes,
    "legacy": legacy_bytes,
    "zip, inside a checkpoint": lambda value: zip_bytes(official_looking(value)),
    "legacy, inside a checkpoint": lambda value: legacy_bytes(official_looking(value)),
    **{f"pickle protocol {i}": functools.partial(pickle.dumps, protocol=i) for i in range(6)},
}
ATTACKS = list(attacks(Path("marker")))


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_malicious_file_is_refused_without_running(attack, writer, tmp_path):
    marker, file = tmp_path / "marker", tmp_path / "weights.pth"
    file.write_bytes(WRITERS[writer](attacks(marker)[attack]))
    with pytest.raises(UnsafeFileError, match=r"weights\.pth is (refused|damaged)"):
        safe_load(file)
    with pytest.raises(UnsafeFileError):
        load_backbone_weights(torch.nn.Linear(2, 2), file)
    assert not marker.exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_corpus_is_live(attack, tmp_path):
    payload = pickle.dumps(attacks(tmp_path / "marker")[attack])
    pickle.loads(payload)
    assert (tmp_path / "marker").exists()


def test_refusal_names_what_the_file_asks_for(tmp_path):
    torch.save({"teacher": Calls(os.system, "true")}, tmp_path / "weights.pth")
    with pytest.raises(UnsafeFileError, match=rf"it asks for {os.system.__module__}\.system"):
        safe_load(tmp_path / "weights.pth")


@pytest.mark.parametrize("code", ["O", "V8", "U4", "M8[s]", [("a", "O")]], ids=str)
def test_numpy_types_other_than_numbers_are_refused(code, tmp_path):
    scalar = np.float64(0).__reduce__()[0]
    torch.save({"lr": Calls(scalar, Calls(np.dtype, code), b"\0" * 8)}, tmp_path / "weights.pth")
    with pytest.raises(UnsafeFileError):
        safe_load(tmp_path / "weights.pth")


def test_forged_state_of_a_numpy_type_is_refused(tmp_path):
    forged = Calls(np.dtype, "f8", False, True, state=(3, "|O", None, None, None, -1, -1, 0))
    torch.save({"lr": Calls(np.float64(0).__reduce__()[0], forged, b"\0" * 8)}, tmp_path / "weights.pth")
    with pytest.raises(UnsafeFileError, match="byte order"):
        safe_load(tmp_path / "weights.pth")


@pytest.mark.parametrize("write", [zip_bytes, legacy_bytes])
def test_official_contents_are_read(write, tmp_path):
    numbers = [np.float64(0.1), np.float32(0.5), np.int64(-3), np.bool_(True)]
    (tmp_path / "weights.pth").write_bytes(write(official_looking(numbers)))
    checkpoint = safe_load(tmp_path / "weights.pth")
    assert checkpoint["args"] == argparse.Namespace(arch="vit_small", lr=5e-4)
    group = checkpoint["optimizer"]["param_groups"][0]
    assert group == {"lr": 0.1, "hook": [0.1, 0.5, -3, True]}
    torch.testing.assert_close(checkpoint["teacher"]["backbone.cls_token"], torch.zeros(1, 1, 4))


def test_safetensors_are_recognised_by_content(tmp_path):
    safetensors.torch.save_file({"weight": torch.arange(3.0)}, tmp_path / "weights.pth")
    torch.testing.assert_close(safe_load(tmp_path / "weights.pth"), {"weight": torch.arange(3.0)})


def test_torchscript_is_refused(tmp_path):
    torch.save({}, tmp_path / "weights.pth")
    with zipfile.ZipFile(tmp_path / "weights.pth", "a") as archive:
        archive.writestr("weights/constants.pkl", pickle.dumps((), protocol=2))  # what marks TorchScript
    with pytest.raises(UnsafeFileError):
        safe_load(tmp_path / "weights.pth")


def test_decompression_bomb_is_refused_before_it_expands(tmp_path):
    with zipfile.ZipFile(tmp_path / "weights.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 24))
    with pytest.raises(UnsafeFileError, match="expand"):
        safe_load(tmp_path / "weights.pth")


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04", b"\x80\x02", b"not a checkpoint", b"12345678{"])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(UnsafeFileError):
        safe_load(tmp_path / "weights.pth")


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        safe_load(tmp_path / "weights.pth")


VALID = {
    "zip": zip_bytes(official_looking(1)),
    "legacy": legacy_bytes(official_looking(1)),
    "safetensors": safetensors.torch.save({"a": torch.zeros(3, 2), "b": torch.ones(1)}),
}


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(VALID)),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    keep=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_damaged_file_is_read_or_refused_but_nothing_else(kind, changes, keep, tmp_path_factory):
    data = bytearray(VALID[kind])
    for position, byte in changes:
        data[int(position * len(data))] = byte
    file = tmp_path_factory.getbasetemp() / "damaged.pth"
    file.write_bytes(data[: int(keep * len(data))])
    try:
        safe_load(file)
    except UnsafeFileError as error:
        assert "damaged.pth" in str(error)


# --- The sources ------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    "pickle.load",
    "pickle.loads",
    "dill.load",
    "dill.loads",
    "joblib.load",
    "marshal.loads",
    "shelve.open",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "torch.hub.load_state_dict_from_url",
    "torch.jit.load",
    "eval",
    "exec",
}


def unsafe_calls(source: str) -> list[str]:
    """Calls in ``source`` that may run code from a file, as ``line: call``."""
    found = []
    tree = ast.parse(source)
    full_names = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    } | {
        alias.asname: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.asname
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(b).endswith("Unpickler") for b in node.bases):
            if not any(isinstance(f, ast.FunctionDef) and f.name == "find_class" for f in node.body):
                found.append(f"{node.lineno}: {node.name} without find_class")
            continue
        if not isinstance(node, ast.Call):
            continue
        first, _, rest = ast.unparse(node.func).partition(".")
        name = full_names.get(first, first) + (f".{rest}" if rest else "")
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        unsafe = (
            name in FORBIDDEN
            or name == "pickle.Unpickler"
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or (name == "numpy.load" and keywords.get("allow_pickle", "False") != "False")
            or keywords.get("allow_pickle") == "True"
        )
        if unsafe:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def sources() -> list[Path]:
    folders = [p for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")]
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    return [p for p in files if p != Path(__file__).resolve()]


def test_sources_read_files_safely():
    found = {str(p.relative_to(ROOT)): unsafe_calls(p.read_text()) for p in sources()}
    assert len(found) > 20
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "from torch import load; load(path)",
        "import torch as t; t.load(path, weights_only=flag)",
        "import pickle; pickle.load(file)",
        "from pickle import loads as read; read(data)",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "import yaml; yaml.load(text, Loader=yaml.Loader)",
        "import pickle\nclass Reader(pickle.Unpickler): pass",
    ],
)
def test_scan_finds_unsafe_calls(line):
    assert unsafe_calls(line) != []


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load(path, weights_only=True)",
        "import numpy as np; np.load(path)",
        "import yaml; yaml.safe_load(text)",
        "model.eval()",
    ],
)
def test_scan_accepts_safe_calls(line):
    assert unsafe_calls(line) == []
