"""SEER's training on a stream: its order, shards, sharded networks, resuming, mistakes, its plan."""

import contextlib
import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from seer.hub import FILES
from seer.main_seer import network_of, parse_args, train_seer
from seer.regnet import RegNet
from seer.sharding import WholeNetwork, shard_network
from seer.stream import StreamSampler, TarShards
from shared import distributed
from shared.images.decode import MAX_PIXELS, ImageError
from shared.images.sources import open_source
from tests.processes import run_processes
from tests.reliability.runs import write_images
from tests.run_folders import losses, state_of, stopped_after
from tests.seer.tiny import FLAGS, add_small_size, train

CPU = torch.device("cpu")
CONFIGS = Path(__file__).resolve().parents[2] / "seer" / "configs"

# --- Stream -----------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, images: Path, count: int = 3) -> Path:
    """Tar files that hold the images, and a text beside each of them."""
    folder.mkdir()
    files = sorted(images.rglob("*.png"))
    for number in range(count):
        with tarfile.open(folder / f"{number:04d}.tar", "w") as archive:
            for file in files[number::count]:
                archive.add(file, f"{number}/{file.name}")
                archive.addfile(tarfile.TarInfo(f"{number}/{file.stem}.txt"), io.BytesIO())
    return folder


def keys(sampler: StreamSampler, start: int = 0) -> list[list[tuple[int, int]]]:
    sampler.set_epoch(0, start)
    return list(sampler)


def test_the_order_of_a_stream_is_that_of_any_number_of_processes_and_of_any_start(monkeypatch):
    whole = keys(StreamSampler(50, None, 2, 8, seed=3, window=16))
    flat = [key for batch in whole for key in batch]
    assert len(whole) == 12 and sorted(flat[:50]) == [(0, i) for i in range(50)]  # every image once in a pass
    assert all(i // 16 == sorted(flat[:50])[place][1] // 16 for place, (_, i) in enumerate(flat[:50]))
    assert flat[:16] != sorted(flat[:16]) and [i for _, i in flat[:16]] != [i for _, i in flat[50:66]]
    assert keys(StreamSampler(50, None, 2, 8, seed=3, window=16), 7) == whole[7:]
    assert keys(StreamSampler(50, None, 2, 8, seed=4, window=16)) != whole
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        ranks.append(keys(StreamSampler(50, None, 2, 4, seed=3, window=16)))
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in whole]


def test_shards_hold_the_images_of_their_files(tmp_path):
    images = open_source(str(write_images(tmp_path / "images")), "train")
    shards = TarShards(sorted(write_shards(tmp_path / "shards", tmp_path / "images").glob("*.tar")), MAX_PIXELS)
    by_name = {Path(images.path(i)).name: i for i in range(len(images))}
    assert len(shards) == len(images) == 24 and shards.label(0) == -1
    for i in range(24):
        same = images.load(by_name[Path(shards.path(i)).name]).decode()
        assert (shards.load(i).decode() == same).all()


def test_a_run_on_shards_that_is_stopped_goes_on_as_it_would_have(tmp_path):
    data = ("--data_path", write_shards(tmp_path / "shards", write_images(tmp_path / "images")), "--shuffle_window", 10)
    train(tmp_path / "whole", *data)
    with stopped_after(5):
        train(tmp_path / "parts", *data, "--num_workers", 2)
    found = train(tmp_path / "parts", *data, "--num_workers", 1)
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert all(torch.equal(tensor, parts["model"][name]) for name, tensor in whole["model"].items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert [line["step"] for line in found if "loss" in line] == [2, 4, 6, 8, 10, 12]
    with pytest.raises(ValueError, match="--feat_dim 5 does not fit the checkpoint"):
        train(tmp_path / "parts", *data, "--feat_dim", 5)


def test_a_finished_run_goes_on_where_its_stream_was_left_when_it_gets_more_passes(tmp_path):
    flags = ("--data_path", write_images(tmp_path / "images"))  # 24 of them
    train(tmp_path / "run", *flags, "--total_images", 22)  # 5 steps of 4
    found = train(tmp_path / "run", *flags)
    assert [line["step"] for line in found if "loss" in line] == [2, 4, 5, 6, 8, 10, 12]
    assert len(train(tmp_path / "run", *flags)) == len(found)  # now there is nothing left


def test_prototypes_are_frozen_and_then_learn(tmp_path):
    data = ("--data_path", write_images(tmp_path / "images"), "--total_images", 12, "--wd", 0.1)
    train(tmp_path / "frozen", *data, "--freeze_prototypes_niters", 3)
    train(tmp_path / "free", *data, "--freeze_prototypes_niters", 0)
    name = "head.prototypes0.weight"
    frozen, free = (state_of(tmp_path / run)["model"][name] for run in ("frozen", "free"))
    torch.testing.assert_close(frozen.norm(dim=1), torch.ones(6))
    assert not torch.equal(frozen, free)
    assert state_of(tmp_path / "frozen")["optimizer"]["state"].keys() == set(
        range(len(state_of(tmp_path / "free")["optimizer"]["state"]) - 1)
    )


# --- Sharded networks -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Networks in float64, so that rounding does not decide which prototype is the likeliest."""
    forward = RegNet.forward
    torch.set_default_dtype(torch.double)
    RegNet.forward = lambda self, images: forward(self, images.double())
    try:
        yield
    finally:
        RegNet.forward = forward
        torch.set_default_dtype(torch.float)


def train_as_rank(rank: int, output_dir: str, flags: tuple, updates: int | None = None) -> None:
    """A training that ends like a killed one after so many updates."""
    from shared.multicrop import MultiCropWrapper

    MultiCropWrapper.embed = _embed_in_double
    with in_double(), stopped_after(updates) if updates else contextlib.nullcontext():
        train(output_dir, *flags)


def _embed_in_double(self, views):
    return torch.cat([self.backbone(view) for view in views])


def test_two_processes_that_share_a_network_are_equal_to_one(tmp_path, monkeypatch):
    from shared.multicrop import MultiCropWrapper

    monkeypatch.setattr(MultiCropWrapper, "embed", MultiCropWrapper.embed)  # given back in the end
    data = ("--data_path", str(write_images(tmp_path / "images")), "--total_images", "24", "--log_freq", "1")
    shared_out = (*data, "--batch_size", "2", "--fsdp", "--recompute")
    folders = {name: str(tmp_path / name) for name in ("alone", "shared")}
    train_as_rank(0, folders["alone"], data)
    run_processes(train_as_rank, 2, folders["shared"], shared_out)
    alone, shared = state_of(folders["alone"]), state_of(folders["shared"])
    assert losses(folders["shared"]) == pytest.approx(losses(folders["alone"]), rel=1e-5)
    assert list(alone["model"]) == list(shared["model"])
    for part in ("model", "optimizer"):
        torch.testing.assert_close(shared[part], alone[part], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_shared_network_that_is_stopped_goes_on_shared_or_alone(tmp_path, monkeypatch):
    from shared.multicrop import MultiCropWrapper

    monkeypatch.setattr(MultiCropWrapper, "embed", MultiCropWrapper.embed)  # given back in the end
    data = ("--data_path", str(write_images(tmp_path / "images")), "--total_images", "24", "--log_freq", "1")
    shared_out = (*data, "--batch_size", "2", "--fsdp", "--recompute")
    folders = {name: str(tmp_path / name) for name in ("shared", "parts", "single")}
    run_processes(train_as_rank, 2, folders["shared"], shared_out)
    shared = state_of(folders["shared"])
    run_processes(train_as_rank, 2, folders["parts"], shared_out, 4)
    assert state_of(folders["parts"])["step_in_epoch"] == 4
    shutil.copytree(folders["parts"], folders["single"])
    run_processes(train_as_rank, 2, folders["parts"], shared_out)
    train_as_rank(0, folders["single"], data)
    torch.testing.assert_close(state_of(folders["parts"])["model"], shared["model"], rtol=0, atol=0)
    torch.testing.assert_close(state_of(folders["single"])["model"], shared["model"], rtol=1e-4, atol=1e-6)


def held_by_rank(rank: int) -> list[int]:
    add_small_size()
    with torch.device("meta"):
        network = network_of(parse_args(FLAGS.split()))
    shard_network(network, [*network.backbone.blocks(), network.head], CPU)
    whole = WholeNetwork(network).state_dict()
    with pytest.raises(ValueError, match="another layout: extra"):
        WholeNetwork(network).load_state_dict(whole | {"extra": torch.zeros(1)})
    return [p.to_local().numel() for p in network.parameters()], [p.numel() for p in network.parameters()]


def test_each_process_holds_half_of_every_tensor():
    for held, whole in run_processes(held_by_rank, 2):
        assert all(abs(part - size / 2) <= size / 4 + 1 for part, size in zip(held, whole, strict=True))
        assert sum(held) < 0.6 * sum(whole)


# --- Mistakes, plan ---------------------------------------------------------------------------------------------------


def test_a_stream_that_cannot_be_read_is_named(tmp_path, capsys):
    images = write_images(tmp_path / "images")
    with pytest.raises(ValueError, match="--total_images 100 is more than the 48 images of the stream"):
        train(tmp_path / "run", "--data_path", images, "--total_images", 100)
    with pytest.raises(ValueError, match="48 images of the run do not fill one step of --batch_size 64"):
        train(tmp_path / "run", "--data_path", images, "--batch_size", 64)
    shards = write_shards(tmp_path / "shards", images)
    with pytest.raises(SystemExit):
        train(tmp_path / "run", "--data_path", shards, "--eval_knn_freq", 1)
    with pytest.raises(ValueError, match=r"--cache memory: --data_path .* holds tar shards, read as they come"):
        train(tmp_path / "run", "--data_path", shards, "--cache", "memory")
    train(tmp_path / "streamed", "--data_path", shards)
    told = capsys.readouterr()
    assert "error: --eval_knn_freq 1: the images of tar files have no classes" in told.err
    assert "no k-NN evaluation: the images of tar files have no classes" in told.out
    whole = (shards / "0001.tar").read_bytes()
    for length in (len(whole) // 2, 700):
        (shards / "0001.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"the shard .*0001.tar is torn or no tar file"):
            train(tmp_path / "run", "--data_path", shards)
    with tarfile.open(shards / "0002.tar") as archive:
        middle = archive.getmembers()[2].offset
    whole = (shards / "0002.tar").read_bytes()
    damaged = whole[: middle + 150] + b"?" + whole[middle + 151 :]
    for found in (damaged, whole[:middle] + bytes(len(whole)), whole + whole):
        (shards / "0001.tar").write_bytes(found)  # tarfile leaves out what follows, without an error
        with pytest.raises(ValueError, match=r"0001.tar is torn .*: [\d,]+ bytes lie behind the last image"):
            train(tmp_path / "run", "--data_path", shards)
    torn = images / "class1" / "1.png"
    torn.write_bytes(torn.read_bytes()[:200])
    with pytest.raises(ImageError, match=r"class1/1.png"):
        train(tmp_path / "run", "--data_path", images, "--on_bad_image", "error")
    train(tmp_path / "other", "--data_path", images)
    assert "class1/1.png" in (tmp_path / "other" / "bad_images.txt").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crops_for_assign", "0", "7"], "--crops_for_assign 0 7: expected different crops from 0 to 3"),
        (["--warmup", "2"], "--warmup 2.0 is not in [0, 1]"),
        (["--arch", "resnet50"], "--arch resnet50 is none of regnet8Gf"),
        (["--nmb_prototypes", "1"], "--nmb_prototypes 1: at least two are needed"),
        (["--fsdp", "--amp", "fp16"], "--fsdp needs another --amp than fp16"),
    ],
)
def test_flags_that_make_no_sense_are_named(flags, message, capsys):
    add_small_size()
    with pytest.raises(SystemExit):
        parse_args([*FLAGS.split(), *flags])
    assert message in capsys.readouterr().err


def test_crops_need_a_value_for_every_resolution(tmp_path):
    with pytest.raises(ValueError, match=r"one value for each resolution: --nmb_crops 2 2, --size_crops 32, "):
        train(tmp_path, "--size_crops", 32)


def test_a_plan_tells_the_memory_before_a_run(capsys):
    add_small_size()
    train_seer(parse_args([*FLAGS.split(), "--plan", "4", "--fsdp", "--recompute", "--device_gib", "0.002"]))
    printed = capsys.readouterr().out
    assert "16 images a step on 4 devices (4 x 1)" in printed and "4 x Block" in printed
    assert "it fits on 1 devices of 0.002 GiB" in printed


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("regnet*.yaml")), ids=lambda path: path.stem)
def test_published_configurations_are_understood(config):
    args = parse_args(["--fname", str(config), "--data_path", "images"])
    assert args.arch == config.stem and args.sinkhorn_iterations == 10 and args.nmb_prototypes == [16000]
    if config.stem == "regnet10B":
        assert (args.size_crops, args.epsilon, args.fsdp, args.warmup) == ([160, 96], 0.03, True, 0.043648)
        assert args.base_lr * 496 * args.batch_size / 256 == pytest.approx(9.3)
    assert parse_args(["--fname", str(config), "--batch_size", "3"]).batch_size == 3  # the command line wins


def test_every_network_whose_weights_are_released_has_a_configuration():
    assert {config.stem for config in CONFIGS.glob("regnet*.yaml")} == {arch for arch, *_ in FILES.values()}
