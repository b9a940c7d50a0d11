"""Linear evaluation, fine-tuning, k-NN, attention pictures and export of one small run."""

import json
import os
import shutil
import signal

import pytest
import torch

from msn import eval_knn, fine_tune, linear_eval, logistic_eval, visualize_attention
from msn.fine_tune import layer_of, param_groups
from msn.labelled_training import Validation, from_official
from msn.vision_transformer import VisionTransformer
from shared.run.attempt import Interrupted
from shared.run.checkpoint import Checkpointer, load_latest
from tests.command_lines import error_of
from tests.msn.tiny import CHECKPOINT
from tests.reliability.runs import assert_same


def send_sigterm_in_call(monkeypatch, owner: type, method: str, number: int) -> None:
    """The run gets SIGTERM in this call (from 1) of a method."""
    real, calls = getattr(owner, method), []

    def with_signal(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, method, with_signal)


def assert_same_end(one, other, file: str) -> None:
    """The checkpoints of two folders are equal, and so are the lines of their epochs."""
    states = [load_latest(folder / file) for folder in (one, other)]
    for state in states:
        del state["args"], state["log"]["lengths"]  # folders, loader processes, and numbers of the clock
    assert_same(*states, file)
    lines = [(folder / file.replace(".pth.tar", ".txt")).read_text() for folder in (one, other)]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 2


# --- Linear evaluation ------------------------------------------------------------------------------------------------


def linear(run, images, folder, *flags) -> dict[str, float]:
    network = ["--model_name", "deit_tiny", "--pretrained", str(run), "--pretrain_path", CHECKPOINT]
    data = ["--data_path", str(images), "--val_path", str(images), "--image_size", "32", "--num_classes", "3"]
    others = ["--epochs", "2", "--batch_size", "8", "--num_workers", "0", "--lr", "0.5", "--device", "cpu"]
    args = linear_eval.parse_args([*network, *data, *others, "--folder", str(folder), *map(str, flags)])
    return linear_eval.linear_eval(args)


def test_linear_evaluation_learns_and_writes_the_official_layout(run, images, tmp_path):
    whole = linear(run, images, tmp_path / "whole")
    assert whole["acc1"] > 50  # chance is 33
    state = load_latest(tmp_path / "whole" / "msn-lin-eval.pth.tar")
    official = {"target_encoder", "classifier", "opt", "epoch", "world_size", "best_top1_acc", "batch_size", "lr"}
    assert official <= state.keys()
    assert set(state["classifier"]) == {"norm.weight", "norm.bias", "linear.weight", "linear.bias"}

    assert linear(run, images, tmp_path / "whole", "--training", "false") == whole
    with pytest.raises(ValueError, match=r"--num_blocks 2 does not fit .*--num_blocks 1"):
        linear(run, images, tmp_path / "whole", "--num_blocks", 2)
    with pytest.raises(ValueError, match="of other weights"):
        linear(run, images, tmp_path / "whole", "--pretrain_path", "msn-ep1.pth.tar")
    with pytest.raises(ValueError, match="--num_classes 2 is less than the 3 classes"):
        linear(run, images, tmp_path / "x", "--num_classes", 2)
    with pytest.raises(ValueError, match="--training false: there is no"):
        linear(run, images, tmp_path / "y", "--training", "false")


def test_linear_evaluation_beside_a_training_ends_like_an_uninterrupted_one(run, images, tmp_path, monkeypatch):
    file = "msn-lin-eval.pth.tar"
    whole = linear(run, images, tmp_path / "whole")
    for name in ("attempt.json", "metrics.jsonl", "log.txt"):  # of a training in another process, which may still run
        shutil.copy(run / name, tmp_path)
    send_sigterm_in_call(monkeypatch, Checkpointer, "after_step", 2)
    with pytest.raises(Interrupted):
        linear(run, images, tmp_path)
    monkeypatch.undo()
    state = load_latest(tmp_path / file)
    assert (state["epoch"], state["step_in_epoch"]) == (0, 2)
    assert linear(run, images, tmp_path) == whole
    assert_same_end(tmp_path, tmp_path / "whole", file)
    for name in ("attempt.json", "metrics.jsonl", "log.txt"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


def test_linear_evaluation_goes_on_with_a_file_of_the_official_layout(run, images, tmp_path):
    whole = linear(run, images, tmp_path / "whole")
    linear(run, images, tmp_path / "first", "--epochs", 2)
    state = load_latest(tmp_path / "first" / "msn-lin-eval.pth.tar")
    for ours in ("args", "pretrained", "log", "step_in_epoch", "images", "skipped_steps", "fp16_scaler"):
        del state[ours]
    (tmp_path / "official").mkdir()
    torch.save(state, tmp_path / "official" / "msn-lin-eval.pth.tar")
    assert linear(run, images, tmp_path / "official") == whole  # nothing is left to do
    shutil.copy(run / CHECKPOINT, tmp_path / "official" / "msn-lin-eval.pth.tar")
    with pytest.raises(ValueError, match="is a checkpoint of another script"):
        linear(run, images, tmp_path / "official")


def test_an_earlier_layout_goes_on_after_the_lines_of_its_log():
    checkpoint = {"best_top1_acc": 50.0, "batch_size": 4, "world_size": 2, "flags": {"lr": 0.1}, "log": [{"epoch": 0}]}
    state = from_official(checkpoint, 7, "msn-lin-eval.pth.tar")
    assert state["log"] == {"lengths": {"log.txt": len('{"epoch": 0}\n')}, "sums": []}
    assert (state["args"], state["batch_size"], state["best_top1_acc"]) == ({"lr": 0.1}, 8, {"best": 50.0})


# --- Fine-tuning ------------------------------------------------------------------------------------------------------


def tune(run, images, folder, *flags) -> dict[str, float]:
    network = ["--model_name", "deit_tiny", "--pretrained", str(run), "--fname", CHECKPOINT]
    data = ["--data_path", str(images), "--val_path", str(images), "--image_size", "32", "--num_classes", "3"]
    others = ["--epochs", "2", "--warmup_epochs", "0", "--batch_size", "8", "--num_workers", "0", "--device", "cpu"]
    args = fine_tune.parse_args([*network, *data, *others, "--output_dir", str(folder), *map(str, flags)])
    return fine_tune.fine_tune(args)


def test_fine_tuning_stopped_in_a_validation_ends_like_an_uninterrupted_one(run, images, tmp_path, monkeypatch):
    """With all of its augmentation."""
    whole = tune(run, images, tmp_path / "whole")
    send_sigterm_in_call(monkeypatch, Validation, "run", 1)
    with pytest.raises(Interrupted):
        tune(run, images, tmp_path / "parts")
    monkeypatch.undo()
    state = load_latest(tmp_path / "parts" / "fine-tune.pth.tar")
    assert (state["epoch"], state["step_in_epoch"]) == (0, 3)
    assert tune(run, images, tmp_path / "parts") == whole
    assert_same_end(tmp_path / "parts", tmp_path / "whole", "fine-tune.pth.tar")


def test_fine_tuning_with_other_flags_than_the_checkpoints_is_refused(run, images, tmp_path):
    tune(run, images, tmp_path, "--epochs", 1)
    with pytest.raises(ValueError, match=r"--mixup 0.0 does not fit .*--mixup 0.8"):
        tune(run, images, tmp_path, "--mixup", 0, "--epochs", 1)
    with pytest.raises(SystemExit):
        tune(run, images, tmp_path / "odd", "--batch_size", 7)


def test_fine_tuning_learns(run, images, tmp_path):
    plain = ("--mixup", 0, "--cutmix", 0, "--rand_augment", "", "--erase", 0, "--drop_path", 0, "--crop_scale", 0.8, 1)
    result = tune(run, images, tmp_path, *plain, "--epochs", 8, "--lr", 0.5)
    losses = [json.loads(line)["train_loss"] for line in (tmp_path / "fine-tune.txt").read_text().splitlines()]
    assert result["acc1"] > 60 and losses[-1] < losses[0]


def test_learning_rates_fall_from_block_to_block():
    network = VisionTransformer(32, 8, embed_dim=24, depth=3, num_heads=3)
    network.fc = torch.nn.Linear(24, 2)
    groups = param_groups(network, 0.05, 0.5)
    names = {id(p): name for name, p in network.named_parameters()}
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == dict(network.named_parameters()).keys()
    assert found["fc.weight"] == (1.0, 0.05) and found["fc.bias"] == (1.0, 0.0) and found["norm.weight"] == (1.0, 0.0)
    assert found["blocks.2.attn.qkv.weight"] == (0.5, 0.05) and found["blocks.0.mlp.fc1.bias"] == (0.125, 0.0)
    assert found["pos_embed"] == (0.0625, 0.0) and found["patch_embed.proj.weight"] == (0.0625, 0.05)
    assert layer_of("blocks.11.norm1.weight", 12) == 12


# --- Flags that the checkpoint answers --------------------------------------------------------------------------------


def knn_of(run, *flags) -> dict[int, tuple[float, float]]:
    flags = ["--pretrained", str(run), "--nb_knn", "1", "--num_workers", "0", "--device", "cpu", *map(str, flags)]
    return eval_knn.eval_knn(eval_knn.parse_args(flags))


def test_the_embedded_images_take_any_run_and_say_what_does_not_fit(run, tmp_path):
    assert knn_of(run)[1][0] > 20  # chance is 8
    with pytest.raises(
        ValueError,
        match="--model_name deit_small contradicts the checkpoint, which was trained with --model_name deit_tiny",
    ):
        knn_of(run, "--model_name", "deit_small")
    for name in ("a-latest.pth.tar", "b-latest.pth.tar"):
        shutil.copy(run / CHECKPOINT, tmp_path / name)
    with pytest.raises(
        ValueError, match=r"is a folder with a-latest.pth.tar, b-latest.pth.tar; name a file as --fname"
    ):
        knn_of(tmp_path)
    (tmp_path / "empty").mkdir()
    flags = ["--pretrained", str(tmp_path / "empty"), "--device", "cpu", "--folder", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"is a folder with no checkpoint .*; name a file as --pretrain_path"):
        linear_eval.linear_eval(linear_eval.parse_args(flags))


@pytest.mark.parametrize("script", [eval_knn, fine_tune, linear_eval, logistic_eval, visualize_attention])
def test_without_flags_it_is_the_run_on_the_embedded_images_that_is_taken(script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert ": run python main.py first" in error_of(script.main, "--device", "cpu")
