"""What stops a job, and whether it comes back without losing or repeating a step."""

import contextlib
import sys

import pytest
import submitit

from shared.run.attempt import Attempt, owner_of
from tests.slurm import jobs


def test_processes_on_two_nodes_form_one_group(submit):
    run = submit("--tasks_per_node", "2", train=jobs.sum_over_processes)
    assert run.job.results() == [10 + 11 + 12 + 13] * 4
    assert run.ends() == "COMPLETED"
    for rank, node in enumerate(("n1", "n1", "n2", "n2")):
        assert f"job {run.id}, attempt 0: rank {rank} of 4 on {node}, rendezvous at n1:" in run.output(rank)


STOPS = {
    "a warning signal": lambda cluster, run: cluster.run("scancel", "--signal=USR2", run.id),
    "a requeue by the operator": lambda cluster, run: cluster.run("scontrol", "requeue", run.id),
    "a preemption": lambda cluster, run: cluster.preempt(),
    "its node set down": lambda cluster, run: cluster.run(
        "scontrol", "update", "nodename=n2", "state=down", "reason=test"
    ),
}


@pytest.mark.parametrize(
    ("stop", "without"),
    [*((stop, None) for stop in STOPS), ("a preemption", "SlurmctldParameters")],
)
def test_a_stopped_job_comes_back_and_loses_and_repeats_no_step(stop, without, submit, cluster):
    """Without these parameters SLURM ends a preempted job with a mere SIGTERM, not with the signal it asked for."""
    with cluster.without(without) if without else contextlib.nullcontext():
        run = submit("--save_every", "2")
        run.wait_for_step(5)
        STOPS[stop](cluster, run)
        assert run.ends() == "COMPLETED"
    assert run.restarts() == 1
    assert run.job.results() == [(1, 3 * 66.0)] * 2  # not the errors that the broken attempt left
    run.assert_every_step_counted_once()
    assert owner_of(run.output_dir) == Attempt(run.id, 1)


def test_a_termination_before_the_warning_does_not_stop_the_requeue(submit, cluster):
    run = submit("--steps", "6", "--step_s", "2")
    run.wait_for_step(1)
    for name in ("TERM", "USR2", "TERM"):  # some clusters send both
        cluster.run("scancel", f"--signal={name}", run.id)
    assert run.ends() == "COMPLETED"
    assert run.restarts() == 1
    run.assert_every_step_counted_once()


def test_a_signal_while_python_starts_does_not_end_the_job(submit, cluster):
    run = submit()
    cluster.wait_for(lambda: all(cluster.tasks(node, program=sys.executable) for node in ("n1", "n2")))
    cluster.run("scancel", "--signal=USR2", run.id)
    assert run.ends() == "COMPLETED"
    run.assert_every_step_counted_once()


def test_a_cancelled_job_has_saved_and_does_not_come_back(submit, cluster):
    run = submit()
    run.wait_for_step(3)
    cluster.run("scancel", run.id)
    assert run.ends() == "CANCELLED"
    assert run.restarts() == 0
    again = submit()  # a new job continues in the same folder
    assert again.ends() == "COMPLETED"
    again.assert_every_step_counted_once()
    assert owner_of(run.output_dir) == Attempt(again.id, 0)


def test_a_failing_rank_fails_the_job_and_is_not_requeued(submit):
    run = submit(train=jobs.fail_on_rank_1)
    assert run.ends() == "FAILED"
    assert run.restarts() == 0
    with pytest.raises(submitit.core.utils.FailedJobError, match="a message of rank 1"):
        run.job.task(1).result()


def test_a_killed_rank_ends_the_job_instead_of_leaving_the_other_one_waiting(submit, cluster):
    run = submit("--steps", "1000")
    run.wait_for_step(2)
    cluster.kill_tasks("n2")
    assert run.ends(timeout_s=60) == "FAILED"
    assert cluster.show(run.id)["ExitCode"] != "0:0"


def test_every_process_gets_its_cpus_and_sees_the_gpus_of_its_node(submit, cluster):
    run = submit("--ngpus", "2", "--cpus_per_task", "3", "--nodes", "1", train=jobs.wait_for_a_signal_once)
    cluster.wait_for(lambda: len(list(run.output_dir.glob("started-*"))) == 2)
    step = cluster.run("scontrol", "--oneliner", "show", "step", f"{run.id}.0").stdout
    assert "Tasks=2" in step
    assert "TresPerTask=cpu:3" in step  # srun would give each process one, whatever sbatch was told
    assert "gres:gpu:2" in step
