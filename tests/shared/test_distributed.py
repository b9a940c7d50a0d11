from argparse import Namespace

import pytest
import torch

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
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_NTASKS", "MASTER_ADDR", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
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
