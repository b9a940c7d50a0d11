"""Published layouts, made from random tensors: read strictly, a tensor at a time, and written again."""

import weakref

import pytest
import torch

from seer import convert_checkpoint
from seer.convert_checkpoint import LICENCE, convert, get_args_parser, official_tensors, to_timm
from seer.hub import CARD
from seer.regnet import RegNet
from shared.networks.pretrained import load_pretrained
from shared.networks.weights import UnsafeFileError, WeightMismatch, safe_load
from tests.seer.tiny import consolidated, official, small_network, write_sharded, write_sliced

NETWORK = small_network()
STATE = NETWORK.state_dict()
HEAD = {"0.projection_head.0.weight": torch.ones(2, 40), "0.prototypes0.weight": torch.ones(3, 2)}


def write(path, layout: str, grouped: bool) -> None:
    model = official(STATE, grouped)
    model["heads"] |= HEAD
    if layout == "consolidated":
        torch.save(consolidated(model), path)
    else:
        (write_sliced if layout == "sliced" else write_sharded)(path, model)


def run(path, out, *flags) -> None:
    convert(get_args_parser().parse_args(["--arch", "regnet_test", "-i", str(path), "-o", str(out), *flags]))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("layout", ["consolidated", "sliced", "sharded"])
def test_every_layout_is_converted_exactly(layout, grouped, tmp_path, capsys):
    write(tmp_path / "seer.torch", layout, grouped)
    run(tmp_path / "seer.torch", tmp_path / "ours.safetensors")
    found = safe_load(tmp_path / "ours.safetensors")
    assert found.keys() == STATE.keys() and all(torch.equal(found[name], value) for name, value in STATE.items())
    run(tmp_path / "seer.torch", tmp_path / "timm.safetensors", "-t", "timm")
    assert set(safe_load(tmp_path / "timm.safetensors")) == {to_timm(name) for name in STATE}
    run(tmp_path / "seer.torch", tmp_path / "again.torch", "-t", "sliced")
    run(tmp_path / "again.torch", tmp_path / "twice.safetensors")
    assert (tmp_path / "twice.safetensors").read_bytes() == (tmp_path / "ours.safetensors").read_bytes()
    assert capsys.readouterr().out.count(LICENCE) == 4


@pytest.mark.parametrize("layout", ["consolidated", "sliced"])
def test_a_card_loads_published_files_and_says_their_licence(layout, tmp_path, capsys):
    write(tmp_path / "seer.torch", layout, grouped=True)
    network = load_pretrained(CARD, "regnet_test", str(tmp_path / "seer.torch"))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(images), NETWORK(images))
    assert LICENCE in capsys.readouterr().out
    run(tmp_path / "seer.torch", tmp_path / "ours.safetensors")
    capsys.readouterr()
    load_pretrained(CARD, "regnet_test", str(tmp_path / "ours.safetensors"))
    assert LICENCE in capsys.readouterr().out


def test_one_tensor_at_a_time_is_in_memory(tmp_path, monkeypatch):
    write(tmp_path / "seer.torch", "sliced", grouped=False)
    alive, most, read = weakref.WeakSet(), [], convert_checkpoint.safe_load

    def counted(path):
        most.append(len(alive))
        tensor = read(path)
        if isinstance(tensor, torch.Tensor):
            alive.add(tensor)
        return tensor

    monkeypatch.setattr(convert_checkpoint, "safe_load", counted)
    run(tmp_path / "seer.torch", tmp_path / "ours.safetensors")
    assert len(most) >= len(STATE) and max(most) <= 1


def broken(kind: str, path) -> str:
    """Damage a file in some way; what the error must name."""
    layout = {"slice": "sliced", "torn slice": "sliced", "shard": "sharded", "torn shard": "sharded"}
    write(path, layout.get(kind, "consolidated"), grouped=False)
    name = next(iter(official(STATE)["trunk"]))
    piece = path.with_suffix("") / f"{name}.torch" if "slice" in kind else path.with_name(f"{path.stem}_shard1.torch")
    if kind in ("slice", "shard"):
        piece.unlink()
        return piece.name
    if kind in ("torn slice", "torn shard"):
        piece.write_bytes(piece.read_bytes()[:100])
        return piece.name
    model = official(STATE)
    if kind == "missing":
        del model["trunk"]["_feature_blocks.conv1.stem.0.weight"]
    elif kind == "unknown":
        model["trunk"]["_feature_blocks.res9.block8-0.proj.weight"] = torch.ones(1)
    elif kind == "shape":
        model["trunk"]["_feature_blocks.conv1.stem.0.weight"] = torch.ones(1)
    elif kind == "not finite":
        model["trunk"]["_feature_blocks.conv1.stem.0.weight"] = torch.full((32, 3, 3, 3), torch.nan)
    torch.save({"model": 1} if kind == "other" else consolidated(model), path)
    return {"unknown": "trunk_output.block8.block8-0.proj.0.weight", "other": str(path)}.get(kind, "stem.0.weight")


KINDS = ("slice", "torn slice", "shard", "torn shard", "missing", "unknown", "shape", "not finite", "other")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_not_whole_is_named(kind, tmp_path):
    named = broken(kind, tmp_path / "seer.torch")
    with pytest.raises((ValueError, WeightMismatch, UnsafeFileError)) as error:
        run(tmp_path / "seer.torch", tmp_path / "ours.safetensors")
    assert named in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_published_file_is_not_replaced_by_its_conversion(tmp_path):
    write(tmp_path / "seer.torch", "consolidated", grouped=False)
    with pytest.raises(ValueError, match=r"--output .*seer.torch is the file of --input"):
        run(tmp_path / "seer.torch", tmp_path / "seer.torch")


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    torch.save(consolidated({"trunk": {"a": Evil()}, "heads": {}}), tmp_path / "seer.torch")
    with pytest.raises(UnsafeFileError, match="refused"):
        list(official_tensors(tmp_path / "seer.torch", RegNet.state_dict(NETWORK)))
