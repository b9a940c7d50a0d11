"""The training of NaViT, its loader and its evaluation."""

from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from PIL import Image

from navit import eval_resolutions
from navit.hub import load_navit
from navit.main import learning_rate_factor, parse_args
from navit.pack import CutMaterials, PackedBatches, TrainPatches
from navit.sampling import Dropping, Resolutions
from shared.images.loading import BadImages
from tests.benchmarks import run_all
from tests.navit.tiny import train
from tests.reliability.runs import write_images
from tests.run_folders import lines, state_of, stopped_after

FEW = ("--data_path", "digits", "--sequence_length", "128", "--batch_size", "16", "--saveckp_steps", "0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Output folder of a run with pictures."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    flags = ("--drop", "none", "--lr", 0.01, "--weight_decay_head", 0, "--epochs", 4, "--test_resolutions", 8, 12)
    for _ in range(2):  # a finished run that is started again ends in the same pictures
        train(folder, *FEW, *flags, "--test_freq", 9, "--pictures", "on")
    return folder


def test_a_network_learns_from_packed_images(finished):
    found = lines(finished)
    last = found[-1]
    assert last["test_acc1"] == last["test_acc1_12"] > 25
    assert (last["test_tokens_8"], last["test_tokens_12"]) == (4, 9)
    pictures = {path.name for path in (finished / "pictures").iterdir()}
    assert pictures == {"packed.png", "cost.png", "curves.png"}
    steps = [line for line in found if "loss" in line]
    assert steps[-1]["loss"] < steps[0]["loss"]
    for line in steps:
        tokens = line["images_per_sequence"] * line["tokens"]
        assert line["padding"] == pytest.approx(1 - tokens / 128, abs=0.02) and line["padding"] < 0.1
        assert 8 <= line["resolution"] <= 16 and line["shrunk"] == 0


def test_open_sequences_are_part_of_the_checkpoint(tmp_path):
    flags = ("--data_path", write_images(tmp_path / "images", 40), "--epochs", 1, "--saveckp_steps", 3)
    train(tmp_path / "whole", *flags)
    with stopped_after(4):
        train(tmp_path / "parts", *flags, "--num_workers", 2)
    waiting = state_of(tmp_path / "parts")["batches"]["processes"][0]
    assert len(waiting["waiting"]) >= 2 and waiting["next"] > 10
    train(tmp_path / "parts", *flags)
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert all(torch.equal(tensor, parts["model"][name]) for name, tensor in whole["model"].items())
    assert whole["batches"] == parts["batches"]


def test_an_epoch_has_the_steps_that_its_images_take_under_a_schedule_of_dropping():
    source, images = CutMaterials("val"), 10 * 360  # of ten epochs, in which ever fewer tokens are dropped
    draws = Resolutions(24, 24), Dropping("constant", rates=(0.1, 0.8), tau=-300.0, middle=1800.0), (36, 36), 0
    data = TrainPatches(source, 4, *draws, BadImages(len(source)))
    batches = PackedBatches(data, 64, 4, images_of_run=images)
    tokens = sum(len(data.draw(number, (32, 32))[1]) for number in range(images))
    assert 10 * batches.steps_per_epoch == pytest.approx(tokens / 256, rel=0.03)
    first = PackedBatches(data, 64, 4)
    assert first.steps_per_epoch < 0.6 * batches.steps_per_epoch  # by the first images alone


@pytest.mark.parametrize("processes", [1, 3])
def test_every_image_comes_once_an_epoch_also_after_a_change_of_the_number_of_processes(processes, monkeypatch):
    source, taken = CutMaterials("val"), []
    monkeypatch.setattr("shared.distributed.all_gather_object", lambda value: [value])

    def batches(rank: int, world_size: int) -> PackedBatches:
        monkeypatch.setattr("shared.distributed.get_rank", lambda: rank)
        monkeypatch.setattr("shared.distributed.get_world_size", lambda: world_size)
        draws = Resolutions(8, 24), Dropping("beta", 0.3, 0.6), (64, 16), 0
        found = PackedBatches(TrainPatches(source, 4, *draws, BadImages(len(source))), 64, 4, ahead=6)
        found._batch = lambda examples, slots: taken.extend(example.number for example in examples)
        return found

    def train(loader: PackedBatches, steps: int) -> dict:
        list(loader.epoch(loader.steps_per_epoch - steps))
        return loader.state_dict()["processes"][0]

    first = batches(0, 2)
    assert sorted(map(first.data.index, range(len(source)))) == list(range(len(source)))
    slow, fast = (train(batches(rank, 2), steps) for rank, steps in enumerate((2, 7)))
    assert fast["next"] - slow["next"] > 40 and len(taken) > 8 * 4  # as of images that are larger on one of them
    then = []
    for rank in range(processes):
        loader = batches(rank, processes)
        loader.load_state_dict({"processes": [slow, fast]})
        assert loader.next == fast["next"] + rank
        then.append(train(loader, 6))
    read = taken + [number for state in then for number in state["waiting"]]
    assert len(read) == len(set(read))
    assert set(read) >= set(range(min(state["next"] for state in then)))


def test_a_long_image_is_shrunk_and_counted_in_training_and_evaluation(tmp_path, capsys):
    for i in range(24):
        file = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        size = (4, 400) if i == 5 else (20, 30)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
    images = ["--data_path", str(tmp_path / "images"), "--val_path", str(tmp_path / "images")]
    flags = ("--drop", "none", "--max_side", 64, "--saveckp_steps", 0, "--epochs", 1, "--test_resolutions", 14, 0)
    found = train(tmp_path / "run", *images, *flags)
    assert sum(line.get("shrunk", 0) for line in found) > 0 and "test_acc1_0" in found[-1]
    said = "1 of 24 images have more than 64 patches a side (--max_side) at their own size: they were made smaller"
    assert capsys.readouterr().out.count(said) == 2  # before the first epoch and after the last one
    args = ["--pretrained", str(tmp_path / "run/checkpoint.pth"), "--device", "cpu", "--output_dir", str(tmp_path)]
    few = ["--num_workers", "0", "--amp", "auto", "--resolutions", "14", "0"]  # the precision of the training
    rows, _ = eval_resolutions.eval_resolutions(eval_resolutions.parse_args([*images, *args, *few]))
    assert [row["shrunk"] for row in rows] == [0, 1] and said in capsys.readouterr().out
    assert rows[1]["tokens"] == pytest.approx((23 * 5 * 8 + 64) / 24)
    assert rows[1]["acc1"] == pytest.approx(found[-1]["test_acc1"])


def test_a_table_holds_the_resolutions_that_were_finished_when_a_later_one_fails(finished, tmp_path, monkeypatch):
    def classify(classifier, val, bad_images, resolution, *how):
        if resolution > 12:
            raise MemoryError
        return look(classifier, val, bad_images, resolution, *how)

    look = eval_resolutions.classify
    monkeypatch.setattr(eval_resolutions, "classify", classify)
    flags = ["--pretrained", str(finished / "checkpoint.pth"), "--data_path", "digits", "--device", "cpu"]
    flags += ["--num_workers", "0", "--output_dir", str(tmp_path), "--resolutions", "8", "12", "16", "--amp", "auto"]
    with pytest.raises(MemoryError):
        eval_resolutions.eval_resolutions(eval_resolutions.parse_args(flags))
    table = [line.split(",") for line in (tmp_path / "resolutions.csv").read_text().splitlines()]
    assert [row[0] for row in table] == ["resolution", "8.0", "12.0"]
    for row in table[1:]:
        assert float(row[4]) == pytest.approx(lines(finished)[-1][f"test_acc1_{float(row[0]):g}"])
    assert len((tmp_path / "cascade.csv").read_text().splitlines()) == 1 + len(eval_resolutions.SHARES)


def test_images_are_found_by_their_captions(tmp_path):
    texts = {"a dark one": 20, "a light one": 230}
    rows = []
    for i in range(40):
        caption = list(texts)[i % 2]
        pixels = np.clip(np.random.default_rng(i).normal(texts[caption], 9, (18, 12 + i % 9, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png\t{caption}")
    (tmp_path / "captions.tsv").write_text("\n".join(rows) + "\n")
    path = tmp_path / "captions.tsv"
    flags = ("--data_path", path, "--val_path", path, "--loss", "contrastive", "--lr", "0.01", "--epochs", "8")
    few_steps = ("--sequence_length", 48, "--batch_size", 2, "--test_freq", 9, "--test_resolutions", 14)
    found = train(tmp_path / "run", *flags, *few_steps, "--drop", "none", "--text_length", 16, "--saveckp_steps", 0)
    assert found[-1]["test_acc1"] > 90
    networks, _ = load_navit(tmp_path / "run" / "checkpoint.pth")
    assert len(networks) == 2 and not networks[0].num_classes


def test_the_evaluation_prints_a_row_per_resolution_and_cascades(finished, tmp_path):
    flags = ["--pretrained", str(finished / "checkpoint.pth"), "--data_path", "digits", "--device", "cpu"]
    flags += ["--num_workers", "0", "--output_dir", str(tmp_path / "out")]
    rows, cascades = eval_resolutions.eval_resolutions(
        eval_resolutions.parse_args([*flags, "--resolutions", "8", "0", "16"])
    )
    assert [row["resolution"] for row in rows] == [8, 16, 0] and [row["tokens"] for row in rows] == [4, 16, 4]
    assert rows[1]["gflops"] > rows[0]["gflops"] > 0
    pair = [c for c in cascades if c["first"] == 8]
    assert pair[0]["acc1"] == rows[0]["acc1"] and pair[-1]["acc1"] == rows[1]["acc1"]
    assert pair[-1]["gflops"] == pytest.approx(rows[0]["gflops"] + rows[1]["gflops"])
    assert (tmp_path / "out" / "cascade.csv").read_text().startswith("first,second,share,gflops,acc1\n")
    assert (tmp_path / "out" / "resolutions.png").exists() and (tmp_path / "out" / "resolutions.csv").exists()
    with pytest.raises(ValueError, match="other classes than those that the classifier was trained on: 3 against 10"):
        flags[flags.index("digits")] = str(write_images(tmp_path / "images"))
        eval_resolutions.eval_resolutions(eval_resolutions.parse_args(flags))


def test_the_learning_rate_rises_falls_and_ends_at_zero():
    rates = [learning_rate_factor(step, 1000, 100, 200) for step in range(1001)]
    assert rates[0] == rates[1000] == 0 and rates[100] == 1 and rates[400] == pytest.approx(0.5)
    assert np.all(np.diff(rates[100:]) < 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution", "4", "64", "--patch_size", "8"], "--patch_size 8 is larger than an image of --resolution 4"),
        (["--clip_grad", "0"], "--clip_grad 0.0 is not positive"),
        (["--resolution", "64", "32"], "--resolution 64 32: expected two sides"),
        (["--drop", "none"], "--sequence_length 128: an image of --resolution 256 has 256 tokens of --patch_size 16"),
        (
            ["--resolution", "16", "64", "--drop", "beta", "--drop_rate", "0.9"],
            "--drop_rate 0.9 is no mean of rates between 0 and --drop_max 0.9",
        ),
        (["--resolution", "16", "64", "--drop", "beta", "--drop_rate", "0"], "--drop_rate 0.0 is no mean of rates"),
        (["--resolution", "16", "64", "--drop_tau", "-1e6"], "--drop_tau is a schedule of --drop_rate, and --drop res"),
        (["--test_freq", "0"], "--test_freq 0 is less than 1"),
        (["--weight_decay", "-1"], "--weight_decay -1.0 is less than 0"),
        (["--drop_rate", "1"], "--drop_rate 1.0 is not in [0, 1)"),
    ],
)
def test_flags_that_make_no_sense_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--data_path", "digits", "--sequence_length", "128", *flags])
    assert message in capsys.readouterr().err


def test_attention_of_gpus_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="--attention varlen is one of GPUs"):
        train(tmp_path, "--attention", "varlen")


def test_photographs_reach_the_benchmarks_that_look_at_them(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(run_all.subprocess, "run", lambda c: commands.append(c) or CompletedProcess(c, 0))
    monkeypatch.setattr("sys.argv", ["run_all.py", "--out", str(tmp_path), "--images", "photographs"])
    run_all.main()
    given = {Path(command[1]).stem for command in commands if command[-2:] == ["--images", "photographs"]}
    assert given == {"bench_multicrop", "bench_navit"} and len(commands) > 20
