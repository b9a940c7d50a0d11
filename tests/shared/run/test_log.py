import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.run.attempt import Attempt, Superseded
from shared.run.log import RunLog, read_log

ROOT = Path(__file__).resolve().parents[3]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(log, steps, start=0):
    for step in range(start, steps):
        log.step(step, 0, images=4, averages={"loss": torch.tensor(float(step))}, entropy=0.5)


def test_a_line_holds_the_mean_since_the_last_one(tmp_path):
    log = RunLog(tmp_path, total_steps=7, log_freq=3)
    run(log, 7)
    written = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in written] == [3, 6, 7]
    assert [line["loss"] for line in written] == [1.0, 4.0, 6.0]
    assert {line["entropy"] for line in written} == {0.5}
    assert log.end_epoch(0) == {"train_loss": 3.0, "epoch": 0}
    assert lines(tmp_path / "log.txt") == [{"train_loss": 3.0, "epoch": 0}]


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    run(RunLog(whole, 10, log_freq=3), 10)

    log = RunLog(killed, 10, log_freq=3)
    run(log, 4)
    state = log.state_dict()
    run(log, 8, start=4)  # these lines belong to steps after the checkpoint
    resumed = RunLog(killed, 10, log_freq=3, resumed=True)
    resumed.load_state_dict(state)
    run(resumed, 10, start=4)

    def losses(folder):
        return [(line["step"], line["loss"]) for line in lines(folder / "metrics.jsonl")]

    assert losses(killed) == losses(whole)


def test_lines_of_another_run_are_put_aside(tmp_path):
    run(RunLog(tmp_path, 3, log_freq=1), 3)
    RunLog(tmp_path, 3, log_freq=1)
    assert len(lines(tmp_path / "metrics.jsonl.1")) == 3
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_lines_that_are_gone_are_reported_and_do_not_stop_the_run(tmp_path, capsys):
    log = RunLog(tmp_path, 4, log_freq=1)
    run(log, 3)
    state = log.state_dict()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # in the middle of the second line
    resumed = RunLog(tmp_path, 4, log_freq=1, resumed=True)
    resumed.load_state_dict(state)
    assert f"WARNING: {path} is shorter than" in capsys.readouterr().out
    run(resumed, 4, start=3)
    assert [line["step"] for line in lines(path)] == [1, 4]


def test_what_is_not_finite_is_null_in_the_file(tmp_path):
    log = RunLog(tmp_path, 1, log_freq=1)
    line = log.step(0, 0, images=1, averages={"loss": math.nan}, kl=torch.tensor(math.inf))
    assert math.isnan(line["loss"])  # as in the line that is returned
    written = (tmp_path / "metrics.jsonl").read_text()
    assert '"loss": null' in written and '"kl": null' in written and "NaN" not in written


def test_a_failed_write_names_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path, 1, log_freq=1)
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
        log.evaluation(0, 0, knn_top1=50.0)


@pytest.mark.parametrize("logger", ["wandb", "mlflow"])
def test_services_get_the_lines_and_a_resumed_run_keeps_its_name(logger, tmp_path):
    """In a process of its own, offline: what they start and set is theirs."""
    pytest.importorskip(logger)
    script = f"""
import sys
from pathlib import Path
from shared.run.log import RunLog
for first, last in ((0, 2), (2, 4)):
    log = RunLog(Path("run"), 4, 1, ["{logger}"], resumed=first > 0, flags={{"lr": 0.5}})
    for step in range(first, last):
        log.step(step, 0, 8, {{"loss": 10.0 - step}})
    log.close()
"""
    (tmp_path / "run").mkdir()
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
    settings |= {"MLFLOW_TRACKING_URI": f"file://{tmp_path}/store", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=os.environ | settings, check=True, timeout=120)
    (identity,) = json.loads((tmp_path / "run" / "loggers.json").read_text()).values()
    if logger == "wandb":  # two parts of one run
        files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
        assert len(files) == 2 and all(file.name == f"run-{identity}.wandb" for file in files)
        assert b"loss" in files[0].read_bytes()
    else:
        (folder,) = (tmp_path / "store").glob(f"*/{identity}")
        lines = [line.split() for line in (folder / "metrics" / "loss").read_text().splitlines()]
        assert [(float(value), int(step)) for _, value, step in lines] == [(10, 1), (9, 2), (8, 3), (7, 4)]
        assert (folder / "params" / "lr").read_text() == "0.5"


def test_a_service_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--loggers wandb: there is no package wandb .*\[loggers\]"):
        RunLog(tmp_path, 1, loggers=["wandb"])


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    log = RunLog(tmp_path, 6, log_freq=1, loggers=["tensorboard"])
    run(log, 2)
    state = log.state_dict()
    run(log, 4, start=2)  # lost: the run goes back to step 2
    log.close()
    resumed = RunLog(tmp_path, 6, log_freq=1, loggers=["tensorboard"], resumed=True)
    resumed.load_state_dict(state)
    run(resumed, 6, start=2)
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_steps_that_are_not_finite_do_not_count(tmp_path):
    log = RunLog(tmp_path, 3, log_freq=3)
    for step, loss in enumerate((1.0, math.nan, 3.0)):
        log.step(step, 0, images=1, averages={"loss": torch.tensor(loss)})
    assert lines(tmp_path / "metrics.jsonl")[0]["loss"] == 2.0


def test_rates_count_the_time_of_the_steps_of_their_line_whatever_the_length_of_an_epoch(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("shared.run.log.time.perf_counter", lambda: now)

    def loader(batches):
        nonlocal now
        for _ in range(batches):
            now += 0.1  # to load
            yield None

    log, step = RunLog(tmp_path, 100, log_freq=4), 0
    for epoch in range(5):
        for _ in log.batches(loader(3)):
            now += 0.3  # to train
            log.step(step, epoch, images=8, averages={})
            step += 1
        now += 50  # an evaluation
    written = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in written] == [4, 8, 12]
    assert [line["images_per_s"] for line in written] == [pytest.approx(8 / 0.4)] * 3
    assert [line["data_wait"] for line in written] == [pytest.approx(0.25)] * 3


def test_a_superseded_attempt_writes_no_line(tmp_path):
    log = RunLog(tmp_path, total_steps=10, log_freq=1)
    log.step(0, 0, images=1, averages={"loss": 1.0})
    Attempt("of a newer job", 0).claim(tmp_path)
    with pytest.raises(Superseded):
        log.step(1, 0, images=1, averages={"loss": 1.0})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_an_unfinished_last_line_is_left_out_and_a_broken_one_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_log(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_log(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 is not a JSON object"):
        read_log(path)


def test_the_first_steps_tell_how_long_the_run_takes_and_how_large_its_folder_becomes(tmp_path, monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("shared.run.log.time.perf_counter", lambda: now)
    part = SimpleNamespace(state_dict=lambda: {"weight": torch.zeros(1000, 1000)})  # 4 MB
    monkeypatch.setattr("shared.run.log.LONG_S", 400)
    monkeypatch.setattr("shared.run.log.peak_memory", lambda: (512_340_000, 25_200_000_000))
    args = Namespace(
        checkpoint_freq=2, small_data=False
    )  # 10 epochs: 5 numbered ones, beside the newest and the one before it
    log = RunLog(tmp_path, 100, log_freq=4)
    log.start(SimpleNamespace(steps_per_epoch=10, batch_size=8), {"network": part}, args)
    for step, _ in enumerate(log.batches(range(8))):
        now += 5 if step == 0 else 3
        log.step(step, 0, images=8, averages={})
    printed = capsys.readouterr().out.splitlines()
    end = f"and 28.0 MB in {tmp_path} in the end; memory so far 0.5 GB of 25.2 GB"
    first = f"about 8 min to go, {end}; try --small_data"  # 99 of 5 s
    assert printed[:2] == ["100 steps in all, 10 per epoch, of 8 images", first]
    assert printed[2].startswith("step 4") and printed[2].endswith("  5 min left")  # 96 of 3 s
    assert printed[3] == f"about 5 min to go, {end}"  # after the 5th: 95 of 3 s
    assert printed[4].startswith("step 8") and len(printed) == 5
    assert [sorted(line) for line in lines(tmp_path / "metrics.jsonl")] == [
        ["data_wait", "epoch", "images_per_s", "step"]
    ] * 2


def test_long_steps_say_each_minute_how_much_time_is_left(tmp_path, monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("shared.run.log.time.perf_counter", lambda: now)
    log = RunLog(tmp_path, 20, log_freq=10)
    log.start(SimpleNamespace(steps_per_epoch=10, batch_size=8), {}, Namespace())
    for step, _ in enumerate(log.batches(range(12))):
        now += 31
        log.step(step, 0, images=8, averages={})
    printed = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" left")]
    assert printed[:3] == [
        f"step {step}  {(20 - step) * 31 / 60:.0f} min left" for step in (4, 6, 8)
    ]  # step 2: estimate
    assert printed[3].startswith("step 10  epoch 0  images_per_s") and printed[4:] == ["step 12  4 min left"]
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [10]


def test_a_disk_that_is_too_small_for_the_checkpoints_is_told_after_the_first_step(tmp_path, monkeypatch, capsys):
    """It was told by the first checkpoint, after an epoch of work."""
    part = SimpleNamespace(state_dict=lambda: {"weight": torch.zeros(1000, 1000)})  # 4 MB, twice
    (tmp_path / "checkpoint.pth").write_bytes(bytes(2_000_000))
    for free, is_told in ((5_000_000, True), (6_500_000, False)):
        monkeypatch.setattr("shared.run.log.shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        log = RunLog(tmp_path, 100, log_freq=4)
        log.start(SimpleNamespace(steps_per_epoch=10, batch_size=8), {"network": part}, Namespace(small_data=False))
        for step, _ in enumerate(log.batches(range(1))):
            log.step(step, 0, images=8, averages={})
        warning = f"WARNING: checkpoints will take 8.0 MB, and {tmp_path} has room for 7.0 MB"
        assert (warning in capsys.readouterr().out) is is_told
