"""The real script: YAML and flags, training, resuming, several processes, copied folders."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from msn.main import parse_args, split_views, start_on_devices, train_msn
from shared.run.checkpoint import load_latest
from shared.run.log import read_log
from tests.command_lines import error_of
from tests.msn.tiny import CHECKPOINT, small_networks, train
from tests.processes import run_processes
from tests.reliability.runs import assert_same
from tests.run_folders import losses, state_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "msn/configs/pretrain").glob("*.yaml"))
# The values of the file that the official code ships, key by key.
PUBLISHED = yaml.safe_load(
    """{
    ent_weight: 0.0, final_sharpen: 0.25, me_max: true, memax_weight: 1.0, num_proto: 1024, start_sharpen: 0.25,
    temperature: 0.1, batch_size: 64, use_ent: true, use_sinkhorn: true, color_jitter_strength: 0.5, pin_mem: true,
    num_workers: 10, label_smoothing: 0.0, patch_drop: 0.15, rand_size: 224, focal_size: 96, rand_views: 1,
    focal_views: 10, bottleneck: 1, copy_data: false, drop_path_rate: 0.0, hidden_dim: 2048, load_checkpoint: false,
    model_name: deit_small, output_dim: 256, read_checkpoint: null, use_bn: true, use_fp16: false,
    use_pred_head: false, clip_grad: 3.0, epochs: 800, final_lr: 1.0e-6, final_weight_decay: 0.4, lr: 0.001,
    start_lr: 0.0002, warmup: 15.0, weight_decay: 0.04
    }"""
)


def official_file(tmp_path: Path, **sections: dict) -> Path:
    """The published YAML file, with the keys that a user has to fill in and with changes."""
    tree = yaml.safe_load((ROOT / "msn/configs/pretrain/msn_vits16.yaml").read_text())
    tree["data"] |= {"root_path": "/datasets", "image_folder": "imagenet"}
    tree["logging"] |= {"folder": str(tmp_path / "run"), "write_tag": "experiment"}
    for section, keys in sections.items():
        tree.setdefault(section, {}).update(keys)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_the_published_file_means_the_published_values(tmp_path):
    args = vars(parse_args(["--fname", str(official_file(tmp_path))]))
    assert {name: args[name] for name in PUBLISHED} == PUBLISHED
    assert args["data_path"] == "/datasets/imagenet/train"
    assert (args["output_dir"], args["write_tag"]) == (str(tmp_path / "run"), "experiment")
    assert args["ema"] == (0.996, 1.0) and args["power_law_exponent"] == 0 and args["amp"] == "fp32"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_understood(path):
    args = parse_args(["--fname", str(path), "--data_path", "/imagenet/train"])
    assert args.epochs >= 200 and args.write_tag == path.stem.replace("_", "-")


def test_flags_win_over_the_file_and_the_file_over_the_embedded_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optimization:\n  epochs: 3\n  lr: 1e-4\n")
    args = parse_args(["--fname", str(path), "--epochs", "2"])
    assert (args.epochs, args.lr, args.model_name, args.output_dir) == (2, 1e-4, "deit_micro", "runs/materials")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"meta": {"model_name": "vit"}}, "meta.model_name: 'vit' is none of"),
        ({"meta": {"use_fp16": True}}, "--use_fp16 True has no effect; use --amp"),
        ({"meta": {"use_pred_head": True}}, "--use_pred_head True has no effect"),
        ({"meta": {"copy_data": True}}, "--copy_data True has no effect; use --cache FOLDER"),
        ({"data": {"patch_drop": 0.999}}, "--patch_drop 0.999 with --rand_size 224: a patch_drop of 0.999 leaves none"),
        ({"data": {"patch_drop": 1.0}}, "--patch_drop 1.0"),
        ({"data": {"patch_drop": -0.1}}, "--patch_drop -0.1"),
        ({"data": {"focal_size": 8}}, "--focal_size 8 is less than the patches of 16 pixels"),
        ({"criterion": {"start_sharpen": 0.0}}, "--start_sharpen 0.0 is not positive"),
        ({"criterion": {"num_proto": 1}}, "--num_proto 1 is less than 2"),
        ({"optimization": {"warmup": 900}}, "--epochs 800 is less than --warmup 900"),
        ({"logging": {"write_tag": "a/b"}}, "--write_tag a/b"),
    ],
)
def test_bad_configs_are_one_clear_message(tmp_path, sections, message):
    assert message in error_of(parse_args, "--fname", official_file(tmp_path, **sections))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_path", "/no/such/folder"], "--data_path /no/such/folder"),
        (["--batch_size", "5000"], "24 images on 1 process"),
        (["--batch_size", "1"], "--batch_size 1: one image has no statistics"),
        (["--rand_views", "0", "--focal_views", "0"], "there has to be an anchor"),
        (["--rand_scale", "0.9", "0.1"], "--rand_scale 0.9 0.1"),
        (["--rand_views", "3", "--focal_views", "-1"], "--rand_views 3 --focal_views -1"),
        (["--color_jitter_strength", "3"], "--color_jitter_strength 3"),
        (["--power_law_exponent", "0.25"], "--use_sinkhorn true balances the targets evenly"),
        (["--prior", "prior.txt", "--power_law_exponent", "0.25"], "--prior prior.txt and --power_law_exponent 0.25"),
        (["--load_checkpoint", "true"], "--load_checkpoint true: there is no"),
        (["--read_checkpoint", "no.pth.tar"], "--read_checkpoint no.pth.tar: there is no such file"),
    ],
)
def test_bad_runs_are_one_clear_message(images, tmp_path, flags, message):
    with pytest.raises(ValueError) as error:
        train(tmp_path, "--data_path", images, *flags)
    assert message in str(error.value)


def test_training_writes_the_official_checkpoint_layout(run):
    written = read_log(run / "metrics.jsonl")
    assert [line["step"] for line in written] == [1, 2, 3, 4, 5, 6]
    assert {"msn", "me_max", "ent", "lr", "wd", "target_entropy", "information", "feature_spread"} <= written[0].keys()
    assert 0 < written[0]["msn"] < 20 and 0 < written[0]["me_max"] < math.log(16)
    state = state_of(run)
    official = {"encoder", "opt", "prototypes", "target_encoder", "epoch", "loss", "batch_size", "world_size", "lr"}
    assert official | {"temperature"} <= state.keys()
    assert (state["epoch"], state["batch_size"], state["world_size"]) == (2, 8, 1)
    assert state["prototypes"].shape == (16, 8)
    assert "fc.bn1.running_mean" in state["encoder"] and state["encoder"].keys() == state["target_encoder"].keys()
    groups = state["opt"]["param_groups"]
    assert [group.get("WD_exclude", False) for group in groups] == [False, True, True]
    assert [group.get("LARS_exclude", False) for group in groups] == [False, False, True]
    assert load_latest(run / "msn-ep1.pth.tar")["epoch"] == 1
    assert json.loads((run / "log.txt").read_text().splitlines()[-1])["train_loss"] == pytest.approx(state["loss"])


def assert_same_weights(one: Path, other: Path) -> None:
    keys = ("encoder", "target_encoder", "prototypes", "epoch", "step_in_epoch", "loss", "batch_size", "lr")
    states = [state_of(folder) for folder in (one, other)]
    assert_same(*({key: state[key] for key in keys} | state["opt"]["state"] for state in states), CHECKPOINT)


def test_the_written_parameters_repeat_the_run(run, images, tmp_path):
    args = parse_args(["--fname", str(run / "params-msn-train.yaml"), "--folder", str(tmp_path)])
    train_msn(args)
    assert_same_weights(tmp_path, run)


def test_the_target_encoder_is_the_moving_average_of_the_encoder_and_keeps_its_own_statistics(run):
    state = state_of(run)
    assert not torch.equal(state["encoder"]["cls_token"], state["target_encoder"]["cls_token"])
    for name in ("fc.bn1.running_mean", "fc.bn1.num_batches_tracked"):
        assert not torch.equal(state["encoder"][name], state["target_encoder"][name])
    # one batch of targets a step; the anchors of two sizes are two
    assert state["target_encoder"]["fc.bn1.num_batches_tracked"] == 6
    assert state["encoder"]["fc.bn1.num_batches_tracked"] == 12


def as_the_official_code_saves(state: dict, world_size: int = 1) -> dict:
    """Its keys, an optimiser that is not fused, names as after several processes, whose gradients of prototypes sum."""
    groups = [
        {k: v for k, v in group.items() if k not in ("fused", "foreach")} for group in state["opt"]["param_groups"]
    ]
    networks = {
        key: {f"module.{name}": value for name, value in state[key].items()} for key in ("encoder", "target_encoder")
    }
    others = {
        key: state[key] for key in ("prototypes", "epoch", "loss", "batch_size", "world_size", "lr", "temperature")
    }
    others |= {"batch_size": state["batch_size"] // world_size, "world_size": world_size}
    moments, prototypes = dict(state["opt"]["state"]), groups[2]["params"][0]
    summed = {"exp_avg": moments[prototypes]["exp_avg"] * world_size}
    summed["exp_avg_sq"] = moments[prototypes]["exp_avg_sq"] * world_size**2
    moments[prototypes] = moments[prototypes] | summed
    return {**networks, "opt": {"state": moments, "param_groups": groups}, **others}


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_checkpoint_of_the_official_code_is_gone_on_with(run, images, tmp_path, world_size):
    official = as_the_official_code_saves(load_latest(run / "msn-ep1.pth.tar"), world_size)
    torch.save(official, tmp_path / "official.pth.tar")
    flags = ("--data_path", images, "--epochs", 2, "--drop_path_rate", 0.2, "--read_checkpoint", "official.pth.tar")
    train(tmp_path, *flags)
    assert losses(tmp_path) == losses(run)[3:]
    assert_same_weights(tmp_path, run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["encoder"].pop("module.cls_token"), "the checkpoint's encoder does not fit this run"),
        (lambda state: state.pop("target_encoder"), "it has no target_encoder"),
        (lambda state: state.pop("prototypes"), "it has no prototypes"),
        (lambda state: state.update(prototypes=torch.zeros(3, 8)), r"prototypes does not fit this run: .*\[3, 8\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(change, message, run, images, tmp_path):
    broken = as_the_official_code_saves(load_latest(run / "msn-ep1.pth.tar"))
    change(broken)
    torch.save(broken, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, "--data_path", images, "--epochs", 2)


def test_options_of_the_loss_and_the_views_train(images, tmp_path):
    options = {
        "focal anchors only, masked": ("--rand_views", 0),
        "one size": ("--focal_size", 32, "--use_sinkhorn", "false", "--power_law_exponent", 0.25),
        "no statistics": ("--use_bn", "false", "--clip_grad", 0, "--label_smoothing", 0.1, "--use_ent", "true"),
        "nothing masked": ("--patch_drop", 0, "--freeze_proto", "true", "--me_max", "false", "--in_chans", 1),
    }
    for name, flags in options.items():
        written = train(tmp_path / name, "--data_path", images, *flags)
        assert len(written) == 3 and all(math.isfinite(line["loss"]) for line in written), name
    state = state_of(tmp_path / "nothing masked")
    assert state["encoder"]["patch_embed.proj.weight"].shape[1] == 1
    torch.manual_seed(0)
    assert state["prototypes"].abs().max() <= 8**-0.5 and state["opt"]["state"].keys().isdisjoint(
        state["opt"]["param_groups"][2]["params"]
    )


def test_views_are_split_into_the_target_and_anchors_per_size():
    views = [torch.arange(6)[:, None], torch.arange(8)[:, None]]
    target, anchors = split_views(views, 2)
    assert target.flatten().tolist() == [0, 1]
    assert [batch.flatten().tolist() for batch in anchors] == [[2, 3, 4, 5], list(range(8))]
    assert len(split_views([torch.zeros(2, 1), torch.zeros(8, 1)], 2)[1]) == 1  # no random anchors


def train_of_rank(rank: int, folder: str, images: str) -> None:
    with small_networks():
        train(folder, "--data_path", images, "--patch_drop", 0, "--batch_size", 4)


def test_two_processes_give_the_losses_of_one_with_twice_the_batch(images, tmp_path):
    one = train(tmp_path / "one", "--data_path", images, "--patch_drop", 0)
    run_processes(train_of_rank, 2, str(tmp_path / "two"), str(images))
    np.testing.assert_allclose(losses(tmp_path / "two"), [line["loss"] for line in one], rtol=2e-4)
    state = state_of(tmp_path / "two")
    assert all(name.startswith("module.") for name in state["encoder"])
    assert (state["batch_size"], state["world_size"]) == (4, 2)
    torch.testing.assert_close(state["prototypes"], state_of(tmp_path / "one")["prototypes"], rtol=1e-3, atol=1e-4)


def test_devices_start_a_process_each(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    start_on_devices(["cuda:1", "cuda:3"], ["--fname", "c.yaml"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert "--nproc_per_node=2" in started[0] and started[0][-4:] == ["--fname", "c.yaml", "--device", "cuda"]
    assert start_on_devices(["cuda:2"], []) == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2" and len(started) == 1
    assert start_on_devices(["cpu"], []) == "cpu" and len(started) == 1
    with pytest.raises(ValueError, match="--devices cpu cuda:0"):
        start_on_devices(["cpu", "cuda:0"], [])
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    start_on_devices(["cuda:1", "cuda:3"], [])
    assert len(started) == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # a shell on a node
    start_on_devices(["cuda:1", "cuda:3"], [])
    assert len(started) == 2
    monkeypatch.setenv("RANK", "0")
    start_on_devices(["cuda:1", "cuda:3"], [])
    assert len(started) == 2
