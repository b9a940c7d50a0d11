"""Files that would run code when unpickled never do, and the sources contain no call that would let them."""

import argparse
import ast
import functools
import io
import os
import pickle
import resource
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.images.decode import read_image
from shared.networks.weights import UnsafeFileError, load_backbone_weights, safe_load
from tests.processes import SERVER

ROOT = Path(__file__).resolve().parents[3]


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


def test_decompression_bomb_is_refused_before_it_expands(tmp_path):
    with zipfile.ZipFile(tmp_path / "weights.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 24))
    with pytest.raises(UnsafeFileError, match="expand"):
        safe_load(tmp_path / "weights.pth")


def contains_itself() -> dict:
    endless = []
    endless.append(endless)
    return {"teacher": endless, "again": endless}


def deep(levels: int) -> bytes:
    """A checkpoint of lists in lists in lists, deeper than Python's own pickle could write it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b".")
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def shared_lists() -> list:
    """Thirty lists that hold the next one twice: a billion ways to the end."""
    inner = [torch.zeros(2)]
    for _ in range(30):
        inner = [inner, inner]
    return inner


BOMBS = {
    "a tensor that repeats one number": (
        zip_bytes({"teacher": {"weight": torch.zeros(1).expand(1 << 20, 1 << 14)}}),
        r"expand to a tensor of shape \(1048576, 16384\)",
    ),
    "the same in the old format": (
        legacy_bytes({"teacher": {"weight": torch.zeros(1).expand(1 << 20, 1 << 14)}}),
        r"expand to a tensor of shape \(1048576, 16384\)",
    ),
    "a sparse tensor": (
        zip_bytes({"weight": torch.sparse_coo_tensor([[0], [0]], [1.0], (1 << 20, 1 << 14), check_invariants=False)}),
        "sparse",
    ),
    "a tensor without data": (zip_bytes({"weight": torch.zeros(1 << 20, 1 << 14, device="meta")}), "without data"),
    "a list in itself": (zip_bytes(contains_itself()), None),
    "a deep list": (deep(100_000), "more than 100 levels"),
    "lists shared a billion times": (zip_bytes(shared_lists()), None),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_small_file_cannot_fill_the_memory_or_keep_the_reader_busy(bomb, tmp_path):
    content, refusal = BOMBS[bomb]
    (tmp_path / "weights.pth").write_bytes(content)
    if refusal is not None:
        with pytest.raises(UnsafeFileError, match=rf"weights\.pth is refused: .*{refusal}"):
            safe_load(tmp_path / "weights.pth")
    with pytest.raises(ValueError):
        load_backbone_weights(torch.nn.Linear(2, 2), tmp_path / "weights.pth")


def read_within(slack_bytes: int, files: list[Path]) -> None:
    """Every file is refused by a process that may take this much more memory than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + slack_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for file in files:
        with pytest.raises(ValueError) as refusal:
            load_backbone_weights(torch.nn.Linear(2, 2), file) if file.suffix == ".pth" else read_image(file).decode()
        assert "emory" not in str(refusal.value) and "alloc" not in str(refusal.value), refusal.value


def test_bombs_are_refused_in_little_memory(tmp_path):
    for number, (content, _) in enumerate(BOMBS.values()):
        (tmp_path / f"{number}.pth").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "compressed.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 28))
    side = 9459  # 89,472,681 pixels are within the limit, 6,000 times as much as the file
    pixels = zlib.compress(bytes(side * (1 + side)))
    for name, width, height, data in (("large", 60000, 60000, b""), ("cut", side, side, pixels[: len(pixels) // 2])):
        chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
        png = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
        (tmp_path / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    process = SERVER.Process(target=read_within, args=(512 << 20, sorted(tmp_path.iterdir())))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def test_tar_files_are_refused_and_nothing_is_unpacked(tmp_path):
    """torch once wrote tar files, and unpacking one can write anywhere."""
    (tmp_path / "inner").mkdir()
    with tarfile.open(tmp_path / "inner" / "weights.pth", "w") as archive:
        for name in ("../outside", "storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo("storages")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "outside")
        archive.addfile(link)
    with pytest.raises(UnsafeFileError):
        safe_load(tmp_path / "inner" / "weights.pth")
    assert [path.name for path in tmp_path.rglob("*")] == ["inner", "weights.pth"]


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04", b"\x80\x02", b"not a checkpoint", b"12345678{"])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(UnsafeFileError):
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
    "torch.load",  # unless weights_only=True
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",  # unless it says what it finds
    "pickle._Unpickler",
    "dill.load",
    "dill.loads",
    "joblib.load",
    "cloudpickle.load",
    "cloudpickle.loads",
    "pandas.read_pickle",
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
    """What may run code from a file, as ``line: expression``: such functions may not even be named."""
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    full_names = {
        alias.asname or alias.name: f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
        for node in imports
        for alias in node.names
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    safe = {call.func for call in calls if "weights_only=True" in map(ast.unparse, call.keywords)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and "find_class" in {getattr(part, "name", None) for part in node.body}:
            safe.update(node.bases)

    def is_forbidden(node: ast.AST) -> bool:
        first, _, rest = ast.unparse(node).partition(".")
        return full_names.get(first, first) + (f".{rest}" if rest else "") in FORBIDDEN

    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute) and node not in safe]
    found = [node for node in names if is_forbidden(node)]
    found += [
        call
        for call in calls
        for k in call.keywords
        if k.arg == "allow_pickle" and ast.unparse(k) != "allow_pickle=False"
    ]
    return [f"{node.lineno}: {ast.unparse(node)}" for node in found]


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
        "import torch; read = torch.load; read(path)",
        "import functools, torch; functools.partial(torch.load, weights_only=False)(path)",
        "from pickle import loads; map(loads, lines)",
    ],
)
def test_scan_finds_unsafe_calls(line):
    assert unsafe_calls(line) != []
    safe = "import numpy, torch, yaml; torch.load(path, weights_only=True); numpy.load(path); yaml.safe_load(text)"
    assert unsafe_calls(f"{safe}; model.eval()") == []


def test_a_torchscript_file_is_called_what_it_is(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    with pytest.raises(UnsafeFileError, match="is refused: it is a TorchScript program"):
        safe_load(tmp_path / "program.pt")
