import math
import os
import signal
import time
from argparse import Namespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from shared import distributed
from shared.run.attempt import NotFinite
from tests.processes import free_port, rank_environment, run_processes


def collectives(rank):
    x = torch.tensor([[1.0 + rank], [10.0 + rank]], requires_grad=True)
    gathered = distributed.all_gather_with_grad(x)
    # every rank weighs the gathered rows differently: the gradient must sum what all ranks want of a row
    weights = torch.arange(float(len(gathered))).view(-1, 1) * (rank + 1)
    (gathered * weights).sum().backward()
    return {
        "sum": distributed.all_reduce_sum(torch.tensor(rank + 1.0)),
        "mean": distributed.all_reduce_mean(torch.tensor(rank + 1.0)),
        "gathered": gathered.detach(),
        "grad": x.grad,
        "objects": distributed.all_gather_object({"rank": rank}),
        "broadcast": distributed.broadcast_object(f"from {rank}", src=1),
        "largest": distributed.max_over_processes(7 * rank),
        "broadcast tensor": distributed.broadcast(torch.tensor([5 + rank])),
        "on main": distributed.gather_on_main(torch.tensor([1.5 + rank])),
        "alone": distributed.all_reduce_sum(torch.tensor(rank + 1.0), distributed.neighbours(1)),
    }


def test_collectives_of_two_processes():
    results = run_processes(collectives, 2)
    for rank, result in enumerate(results):
        assert result["sum"] == 3 and result["mean"] == 1.5
        assert result["gathered"].flatten().tolist() == [1, 10, 2, 11]
        assert result["grad"].flatten().tolist() == [3.0 * (2 * rank), 3.0 * (2 * rank + 1)]
        assert result["objects"] == [{"rank": 0}, {"rank": 1}]
        assert result["broadcast"] == "from 1"
        assert result["largest"] == 7
        assert result["broadcast tensor"] == 5
        assert result["alone"] == rank + 1
    assert results[0]["on main"].tolist() == [[1.5], [2.5]] and results[1]["on main"] is None


def test_collectives_of_one_process_are_the_identity():
    result = {key: value for key, value in collectives(0).items() if key not in ("gathered", "grad", "broadcast")}
    expected = {"sum": 1, "mean": 1, "objects": [{"rank": 0}], "largest": 0}
    assert result == expected | {"broadcast tensor": 5, "on main": torch.tensor([[1.5]]), "alone": 1}


def test_processes_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(ValueError, match="1 processes cannot be divided into groups of 3"):
        distributed.neighbours(3)


def disagree(rank):
    distributed.check_same_on_all_processes(10, "the batch size")
    try:
        distributed.check_same_on_all_processes(100 + rank, "the number of images")
    except ValueError as error:
        return str(error)


def test_processes_that_see_different_data_sets_say_so():
    message = "the number of images differs between processes: rank 0 has 100, rank 1 has 101"
    assert run_processes(disagree, 2) == [message, message]


@pytest.fixture
def launcher(monkeypatch):
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") or name.startswith(("SLURM_", "MASTER_")):
            monkeypatch.delenv(name)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)  # and again after the test
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    return monkeypatch


def test_a_world_that_does_not_come_up_is_an_error_that_names_the_rank(launcher):
    for name, value in rank_environment(1, 2, free_port()).items():
        launcher.setenv(name, value)
    with pytest.raises(
        distributed.WorldNotFormed, match=r"rank 1 of 2 could not form the process group at 127\.0\.0\.1:\d+"
    ):
        distributed.init(device="cpu", timeout_s=1)


def test_ranks_without_an_address_are_an_error(launcher):
    launcher.setenv("RANK", "0")
    launcher.setenv("WORLD_SIZE", "2")
    with pytest.raises(distributed.WorldNotFormed, match="MASTER_ADDR is not set"):
        distributed.init(device="cpu")


def test_a_slurm_allocation_of_several_tasks_without_srun_is_not_trained_as_one_process(launcher):
    launcher.setenv("SLURM_NTASKS", "8")
    with pytest.raises(distributed.WorldNotFormed, match="SLURM_NTASKS=8 but was not started by srun"):
        distributed.init(device="cpu")


def set_step(launcher, **others):
    """The variables of task 1 of step 3, of 2 + 2 + 1 tasks, in an allocation of 8."""
    step = {"JOB_ID": 41, "STEP_ID": 3, "NTASKS": 8, "PROCID": 1, "LOCALID": 1, "STEP_NUM_TASKS": 5}
    for name, value in (step | {"STEP_TASKS_PER_NODE": "2(x2),1", "STEP_NODELIST": "n1"} | others).items():
        launcher.setenv(f"SLURM_{name}", str(value))


def test_the_processes_of_a_step_are_those_that_srun_started(launcher):
    set_step(launcher)
    assert distributed._launched_as() == (1, 5, 1)
    assert os.environ["LOCAL_WORLD_SIZE"] == "2" and not distributed._shares_gpu()
    set_step(launcher, STEP_NUM_TASKS=1, PROCID=0, LOCALID=0)  # the shell of an interactive job
    assert distributed.init(device="cpu").type == "cpu" and distributed.get_world_size() == 1


def test_steps_that_run_side_by_side_have_ports_of_their_own(launcher):
    launcher.setattr(distributed, "_first_slurm_host", lambda: "127.0.0.1")
    launcher.setattr(dist, "rendezvous", Mock(side_effect=ValueError))
    ports = set()
    for step in (0, 1):
        set_step(launcher, STEP_ID=step)
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            launcher.delenv(name, raising=False)
        with pytest.raises(distributed.WorldNotFormed):
            distributed.init(device="cpu")
        ports.add(os.environ["MASTER_PORT"])
    assert len(ports) == 2


@pytest.mark.parametrize(("name", "value"), [("RANK", "a"), ("WORLD_SIZE", "-2"), ("LOCAL_RANK", "")])
def test_a_variable_that_is_no_number_is_named(launcher, name, value):
    for variable, number in (rank_environment(0, 2, 1) | {name: value}).items():
        launcher.setenv(variable, number)
    with pytest.raises(distributed.WorldNotFormed, match=f"variable {name} should be a number, but is '{value}'"):
        distributed.init(device="cpu")


def test_a_step_without_srun_s_variables_is_an_error(launcher):
    set_step(launcher)
    launcher.delenv("SLURM_STEP_NODELIST")
    with pytest.raises(distributed.WorldNotFormed, match="SLURM_STEP_NODELIST"):
        distributed.init(device="cpu")


@pytest.mark.parametrize("timeout_s", [math.nan, math.inf, 0, -1])
def test_a_timeout_that_is_none_is_refused(timeout_s):
    with pytest.raises(ValueError, match=f"--dist_timeout {timeout_s}: expected"):
        distributed.init(device="cpu", timeout_s=timeout_s)


class Heard(Exception):
    """A signal has been handled."""


def test_a_process_that_waits_for_the_others_hears_signals(launcher):
    def hear(*_):
        raise Heard

    for name, value in rank_environment(0, 2, free_port()).items():
        launcher.setenv(name, value)
    handler = signal.signal(signal.SIGALRM, hear)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    start = time.monotonic()
    try:
        with pytest.raises(Heard):
            distributed.init(device="cpu", timeout_s=10)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert time.monotonic() - start < 5


def raise_lost_rank(rank):
    try:
        with distributed.naming_lost_ranks():
            raise RuntimeError("a bug of this process, not of a collective")
    except distributed.RankLost:
        return "taken for a lost rank"
    except RuntimeError as error:
        return str(error)


def test_a_processs_own_error_is_not_taken_for_a_lost_rank():
    assert run_processes(raise_lost_rank, 2) == ["a bug of this process, not of a collective"] * 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("--flag 3 is wrong"), 2, "error: --flag 3 is wrong\n"),
        (OSError(28, "No space left on device", "/run/x"), 2, "error: No space left on device: /run/x\n"),
        (NotFinite("10 steps in a row"), 3, "error: 10 steps in a row\n"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            4,
            "error: DataLoader worker (pid 7)",
        ),
        (distributed.WorldNotFormed("rank 1 of 2: why"), 4, "error: rank 1 of 2: why\n"),
        (torch.OutOfMemoryError("2 GiB"), 2, "error: out of memory, a smaller batch needs less: 2 GiB\n"),
        (KeyboardInterrupt(), 130, "error: stopped by Ctrl-C\n"),
    ],
)
def test_each_way_to_end_has_its_exit_code_and_one_line(error, code, message, capsys):
    with pytest.raises(SystemExit) as end, distributed.clean_exit():
        raise error
    assert end.value.code == code
    printed = capsys.readouterr().err
    assert printed.startswith(message) and printed.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shape"), distributed.clean_exit():
        raise RuntimeError("shape mismatch")


def test_scripts_can_print_names_of_any_bytes(capsysbinary):
    with distributed.clean_exit():
        print("caf\udce9")
    assert capsysbinary.readouterr().out == b"caf\xe9\n"


@pytest.mark.parametrize(("flags", "advice"), [({"batch_size": 8}, "lower --batch_size"), ({}, "take smaller images")])
def test_a_script_that_runs_out_of_memory_names_the_flags_of_the_batch(flags, advice, capsys):
    with pytest.raises(SystemExit) as end:
        distributed.run_script(lambda _: torch.empty(2**60, dtype=torch.uint8), lambda: Namespace(**flags))
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.startswith(f"error: out of memory: {advice}") and printed.count("\n") == 1
