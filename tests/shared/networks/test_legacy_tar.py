"""Files as torch 0.1.8 wrote them under Python 2, made here byte by byte."""

import io
import os
import pickle
import pickletools
import struct
import tarfile
from collections import OrderedDict

import pytest
import torch

from shared.networks.legacy_tar import is_legacy_tar, read_legacy_tar
from shared.networks.weights import UnsafeFileError, safe_load
from tests.shared.networks.test_safe_loading import Calls

NUMPY_CODES = {torch.float32: "Float", torch.float64: "Double", torch.int64: "Long", torch.uint8: "Byte"}


class TypeName:
    """Pickled as the global ``torch.<name>``."""

    def __init__(self, name: str):
        self.name = name


class Pickler(pickle._Pickler):
    """Protocol 2 with tensors as references and with the names of types that torch no longer has."""

    def __init__(self, file, tensors=()):
        super().__init__(file, protocol=2)
        self.tensors = list(tensors)

    def persistent_id(self, value):
        found = [i for i, tensor in enumerate(self.tensors) if tensor is value]
        return str(1000 + found[0]) if found else None

    def save(self, value, *arguments, **keywords):
        if isinstance(value, TypeName):
            self.write(pickle.GLOBAL + f"torch\n{value.name}\n".encode())
        else:
            super().save(value, *arguments, **keywords)


def dumps(value, tensors=()) -> bytes:
    file = io.BytesIO()
    Pickler(file, tensors).dump(value)
    return python2_strings(file.getvalue())


def python2_strings(data: bytes) -> bytes:
    """Short unicode strings become the byte strings of Python 2."""
    positions = [(position, text) for code, text, position in pickletools.genops(data) if code.name == "BINUNICODE"]
    for position, text in reversed(positions):
        raw = text.encode()
        old = b"X" + struct.pack("<I", len(raw)) + raw
        assert data[position : position + len(old)] == old
        data = data[:position] + b"U" + bytes([len(raw)]) + raw + data[position + len(old) :]
    return data


def write(path, value, tensors, storage_of=None, members=None) -> None:
    """A tar file whose tensors share storages as ``tensors`` do."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    keys = {pointer: 2000 + i for i, pointer in enumerate(storages)}
    blobs = [dumps(len(storages))]
    for pointer, tensor in storages.items():
        whole = torch.empty(0, dtype=tensor.dtype).set_(
            tensor.untyped_storage(), 0, (tensor.untyped_storage().nbytes() // tensor.itemsize,)
        )
        kind = TypeName(f"{NUMPY_CODES[tensor.dtype]}Storage")
        blobs += [dumps((keys[pointer], "cpu", kind)), struct.pack("<q", len(whole)), whole.numpy().tobytes()]
    content = {"sys_info": dumps({"protocol_version": 1000}), "storages": b"".join([*blobs, dumps([])])}
    blobs = [dumps(len(tensors))]
    for i, tensor in enumerate(tensors):
        kind = TypeName(f"{NUMPY_CODES[tensor.dtype]}Tensor")
        key = keys[tensor.untyped_storage().data_ptr()] if storage_of is None else storage_of
        layout = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
        blobs += [
            dumps((1000 + i, key, kind)),
            struct.pack("<ii", tensor.dim(), 0),
            struct.pack(f"<{len(layout)}q", *layout),
        ]
    content |= {"tensors": b"".join(blobs), "pickle": dumps(value, tensors)} | (members or {})
    with tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def example():
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    tensors = [
        weight,
        weight.t()[1:],
        torch.arange(5),
        torch.randn(2, dtype=torch.float64),
        torch.tensor([7, 255], dtype=torch.uint8),
    ]
    value = {
        "epoch": 3,
        "arch": "alexnet",
        "state_dict": OrderedDict((f"layer.{i}", tensor) for i, tensor in enumerate(tensors)),
        "optimizer": {
            "state": {2**40: {"momentum_buffer": tensors[0]}},
            "param_groups": [{"lr": 0.05, "params": [2**40]}],
        },
    }
    return value, tensors


def test_tensors_and_values_are_read(tmp_path):
    value, tensors = example()
    write(tmp_path / "old.pth.tar", value, tensors)
    assert is_legacy_tar(tmp_path / "old.pth.tar")
    found = safe_load(tmp_path / "old.pth.tar")
    assert (found["epoch"], found["arch"]) == (3, "alexnet")
    assert list(found["state_dict"]) == [f"layer.{i}" for i in range(5)]
    for name, tensor in value["state_dict"].items():
        assert found["state_dict"][name].dtype == tensor.dtype and torch.equal(found["state_dict"][name], tensor)
    assert found["optimizer"]["param_groups"] == [{"lr": 0.05, "params": [2**40]}]
    first, second = found["state_dict"]["layer.0"], found["state_dict"]["layer.1"]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()  # they share memory as before


def test_torch_takes_the_files_made_here_for_its_own(tmp_path):
    value, tensors = example()
    write(tmp_path / "old.pth.tar", value, tensors)
    with pytest.raises(Exception, match=r"legacy \.tar format"):
        torch.load(tmp_path / "old.pth.tar", weights_only=True)


@pytest.mark.parametrize("member", ["pickle", "storages", "tensors"])
def test_code_is_refused_without_running(member, tmp_path):
    value, tensors = example()
    attack = pickle.dumps(Calls(os.system, f"touch {tmp_path / 'marker'}"), protocol=2)
    write(tmp_path / "old.pth.tar", value, tensors, members={member: attack})
    with pytest.raises(UnsafeFileError, match=r"is refused: it asks for posix.system"):
        safe_load(tmp_path / "old.pth.tar")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("member", ["pickle", "storages", "tensors"])
def test_torn_files_are_refused(member, tmp_path):
    value, tensors = example()
    write(tmp_path / "old.pth.tar", value, tensors)
    with tarfile.open(tmp_path / "old.pth.tar") as archive:
        data = archive.extractfile(member).read()
    write(tmp_path / "torn.pth.tar", value, tensors, members={member: data[: len(data) // 2]})
    with pytest.raises(UnsafeFileError, match=r"torn.pth.tar is damaged"):
        safe_load(tmp_path / "torn.pth.tar")
    write(tmp_path / "torn.pth.tar", value, tensors, storage_of=99)
    with pytest.raises(UnsafeFileError, match=r"torn.pth.tar is damaged"):
        safe_load(tmp_path / "torn.pth.tar")


def test_tensors_larger_than_their_storage_are_refused(tmp_path):
    small = torch.zeros(4)
    for forged in (small.expand(1000, 4), small.as_strided((2, 2), (0, 0))):
        write(tmp_path / "old.pth.tar", [forged], [forged])
        if forged.numel() <= 4:
            assert safe_load(tmp_path / "old.pth.tar")[0].shape == (2, 2)
            continue
        with pytest.raises(UnsafeFileError, match=r"a tensor of .1000, 4. in a storage of 4 elements"):
            safe_load(tmp_path / "old.pth.tar")


def test_other_archives_are_refused(tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(__file__, "pickle")
    with pytest.raises(UnsafeFileError, match=r"images.tar is damaged"):
        safe_load(tmp_path / "images.tar")
    for name in ("storages", "tensors"):
        with tarfile.open(tmp_path / "link.tar", "w") as archive:
            for member in ("storages", "tensors", "pickle"):
                info = tarfile.TarInfo(member)
                if member == name:
                    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(info)
        with pytest.raises(ValueError, match="something else than plain files"):
            read_legacy_tar(tmp_path / "link.tar")
