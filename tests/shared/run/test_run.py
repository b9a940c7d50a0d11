"""A run around a loop of its own: what it saves, logs, leaves out and where it goes on."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shared.optimisation.optim import build_optimizer, clip_grad_norm_per_tensor_
from shared.run.attempt import Attempt, NotFinite, owner_of
from shared.run.checkpoint import load_latest
from shared.run.flags import add_run_flags
from shared.run.run import Run

STEPS = 5  # of an epoch
DATA = SimpleNamespace(steps_per_epoch=STEPS, batch_size=4, checksum=7)


def flags(output_dir, *arguments, seed=5):
    parser = argparse.ArgumentParser()
    add_run_flags(parser)
    parser.set_defaults(output_dir=str(output_dir), seed=seed, width=3)
    return parser.parse_args(["--device", "cpu", "--log_freq", "2", "--saveckp_minutes", "0", *arguments])


class Batches:
    """Batches as functions of their place; those at ``bad`` steps hold a NaN."""

    def __init__(self, bad=()):
        self.bad, self.start = bad, 0

    def set_epoch(self, epoch, start_step):
        self.start = epoch * STEPS + start_step

    def __iter__(self):
        for step in range(self.start, (self.start // STEPS + 1) * STEPS):
            images = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            images[0, 0] = torch.nan if step in self.bad else images[0, 0]
            yield images, torch.arange(4)


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))


def train(output_dir, *arguments, bad=(), stop_after=None, epochs=3, layout=None, lr=0.1, beside=None, **options):
    """Train the network; ``stop_after`` so many steps as if the machine had gone."""
    run = Run(flags(output_dir, *arguments), "fp32", **(beside or {}))
    network = build()
    optimizer = build_optimizer("sgd", [{"params": list(network.parameters()), "lr": lr}])
    layout = layout or {}
    run.resume(DATA, epochs * STEPS, ("width",), **layout, **options, network=network, optimizer=optimizer)
    batches = Batches(bad)
    with run:
        for epoch in run.epochs():
            batches.set_epoch(epoch, run.step_in_epoch)
            for step, (images, _) in run.steps(batches):
                if step == stop_after:
                    return run, network
                optimizer.zero_grad()
                loss = network(images).square().mean()
                run.backward(loss, optimizer)
                run.update(clip_grad_norm_per_tensor_(network.parameters(), 0), optimizer)
                run.end_step(len(images), {"loss": loss})
            run.log_epoch()
            run.end_epoch()
    return run, network


def lines(folder, file="metrics.jsonl"):
    timings = ("images_per_s", "data_wait")
    text = (folder / file).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timings} for line in text]


@pytest.mark.parametrize("stop_after", [0, 3, 5, 8, 14])
def test_a_run_stopped_anywhere_ends_like_an_uninterrupted_one(stop_after, tmp_path):
    _, whole = train(tmp_path / "whole")
    train(tmp_path / "run", "--saveckp_steps", "2", stop_after=stop_after)
    run, network = train(tmp_path / "run", "--saveckp_steps", "2")
    for key, value in whole.state_dict().items():
        assert torch.equal(network.state_dict()[key], value), key
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert run.is_new is (stop_after < 2)


def test_a_run_has_its_seed_and_owns_its_folder(tmp_path):
    run = Run(flags(tmp_path / "run"), "fp32", subfolder="checkpoints")
    drawn = torch.rand(3)
    assert run.device == torch.device("cpu") and (run.output_dir / "checkpoints").is_dir()
    assert owner_of(run.output_dir) == Attempt.current()
    Run(flags(tmp_path / "run"), "fp32")
    assert torch.equal(torch.rand(3), drawn)
    Run(flags(tmp_path / "run", seed=6), "fp32")
    assert not torch.equal(torch.rand(3), drawn)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    train(tmp_path, epochs=1)
    run = Run(argparse.Namespace(**vars(flags(tmp_path)) | {"width": 4}), "fp32")
    with pytest.raises(ValueError, match="--width 4 does not fit the checkpoint"):
        run.resume(DATA, STEPS, ("width",), network=build())


def test_a_file_of_weights_under_the_name_of_a_checkpoint_is_refused_and_the_log_stays(tmp_path):
    train(tmp_path, epochs=1)
    log = (tmp_path / "metrics.jsonl").read_text()
    for file in ("checkpoint.pth", "checkpoint.pth.previous"):
        torch.save(build().state_dict(), tmp_path / file)
    with pytest.raises(ValueError, match=r"the checkpoint in --output_dir .* is not that of a training run"):
        train(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == log


def test_a_folder_with_a_run_of_another_script_is_refused(tmp_path):
    train(tmp_path, epochs=1)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"--output_dir .* holds checkpoint.pth of another run"):
        Run(flags(tmp_path), "fp32", "checkpoint.pth.tar", subfolder="checkpoints")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    Run(flags(tmp_path), "fp32", "probe.pth.tar", owns_folder=False)


def test_layouts_are_functions_between_dictionaries(tmp_path):
    layout = {
        "to_official": lambda state: {("model" if k == "network" else k): v for k, v in state.items()},
        "from_official": lambda state: {("network" if k == "model" else k): v for k, v in state.items()},
    }
    _, whole = train(tmp_path / "whole")
    train(tmp_path / "run", "--saveckp_steps", "1", stop_after=7, layout=layout)
    assert "model" in load_latest(tmp_path / "run/checkpoint.pth")
    _, network = train(tmp_path / "run", layout=layout)
    assert torch.equal(network[0].weight, whole[0].weight)


def test_options_that_no_step_sets_are_those_of_the_flags(tmp_path):
    train(tmp_path / "a", epochs=1, lr=0.1)
    for scheduled, expected in ((("lr",), 0.1), ((), 0.2)):
        run = Run(flags(tmp_path / "a"), "fp32")
        network = build()
        optimizer = build_optimizer("sgd", [{"params": list(network.parameters()), "lr": 0.2}])
        run.resume(DATA, 2 * STEPS, (), scheduled=scheduled, network=network, optimizer=optimizer)
        assert optimizer.param_groups[0]["lr"] == expected


def test_a_step_that_is_not_finite_is_left_out(tmp_path):
    _, network = train(tmp_path, bad={3})
    assert [line["skipped"] for line in lines(tmp_path)] == [0, 0.5, 0, 0, 0, 0, 0, 0]
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_too_many_such_steps_end_the_run_at_its_last_good_checkpoint(tmp_path):
    arguments = ("--max_skipped_steps", "3", "--saveckp_steps", "1")
    with pytest.raises(NotFinite, match=r"3 steps in a row, up to step 10, .* is the input of network "):
        train(tmp_path, *arguments, bad=range(7, 100))
    report = torch.load(tmp_path / "nonfinite.pth", weights_only=True)
    assert (report["step"], report["epoch"], report["first_not_finite"]) == (9, 1, "the input of network")
    assert report["batch"][0][0, 0].isnan() and report["batch"][1].tolist() == [0, 1, 2, 3]
    saved = load_latest(tmp_path / "checkpoint.pth")
    assert (saved["epoch"], saved["step_in_epoch"]) == (1, 2)
    train(tmp_path, "--saveckp_steps", "1")
    train(tmp_path / "whole")
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_evaluations_are_logged_where_the_run_stands(tmp_path):
    run, _ = train(tmp_path, epochs=1)
    run.log_evaluation(knn_top1=50.0)
    assert lines(tmp_path)[-1] == {"step": STEPS, "epoch": 1, "knn_top1": 50.0}


def test_a_run_beside_another_one_leaves_its_folder_alone_and_logs_under_its_own_name(tmp_path):
    train(tmp_path)
    other = Attempt("another job", 0)
    other.claim(tmp_path)
    names = ("attempt.json", "metrics.jsonl", "log.txt", "checkpoint.pth")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    beside = {"file": "probe.pth.tar", "owns_folder": False}
    train(tmp_path, beside=beside, stop_after=8)
    train(tmp_path, beside=beside)
    assert owner_of(tmp_path) == other and before == {name: (tmp_path / name).read_bytes() for name in names}
    assert lines(tmp_path, "probe.jsonl") == lines(tmp_path)
    assert (tmp_path / "probe.txt").read_text() == (tmp_path / "log.txt").read_text()
    assert load_latest(tmp_path / "probe.pth.tar")["epoch"] == 3
