"""Time limits, dead hosts and cut networks: minutes, for SLURM takes its time to notice."""

import os
import signal
import sys

import pytest

from shared.run.attempt import Attempt, owner_of
from tests.slurm import jobs


def test_a_job_longer_than_its_time_limit_finishes_in_several_attempts(submit, cluster):
    run = submit("--timeout", "1", "--signal_delay_s", "30", "--steps", "60", "--step_s", "0.6")
    assert run.ends() == "COMPLETED"
    assert run.restarts() >= 1
    run.assert_every_step_counted_once()


def test_a_job_that_reaches_its_limit_of_restarts_fails_with_the_reason(submit, cluster):
    run = submit("--max_restarts", "0")
    run.wait_for_step(2)
    cluster.run("scancel", "--signal=USR2", run.id)
    assert run.ends() == "FAILED"
    assert "was restarted 0 times (--max_restarts)" in run.output(0)
    again = submit()
    assert again.ends() == "COMPLETED"
    again.assert_every_step_counted_once()


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_job_on_a_host_that_dies_continues_from_its_last_periodic_save(submit, cluster, node):
    run = submit("--save_every", "2", "--steps", "30")
    run.wait_for_step(5)
    cluster.kill_node(node)
    assert run.ends() == "COMPLETED"
    assert run.restarts() == 1
    run.assert_every_step_counted_once()
    assert run.job.results() == [(1, 3 * 435.0)] * 2  # not the errors that the broken attempt left


def test_a_node_daemon_alone_can_die_without_harm(submit, cluster):
    run = submit()
    run.wait_for_step(2)
    cluster.kill_daemon("n2")
    assert run.ends() == "COMPLETED"
    assert run.restarts() == 0
    run.assert_every_step_counted_once()


def test_a_cut_off_attempt_stops_writing_when_the_next_one_has_started(submit, cluster):
    run = submit("--nodes", "1", "--save_every", "100", "--steps", "300", "--step_s", "0.2")
    run.wait_for_step(3)
    cluster.set_network("n1", up=False)  # the process lives on there, and the shared folder is still within its reach
    assert run.ends() == "COMPLETED"
    assert "attempt 0: rank 0 of 1 on n1" in run.output(0)
    assert "attempt 1: rank 0 of 1 on n2" in run.output(0)
    assert f"attempt 0 of job {run.id} writes nothing more" in run.output(0)
    run.assert_every_step_counted_once()
    assert owner_of(run.output_dir) == Attempt(run.id, 1)


def test_a_zombie_rank_does_not_replace_the_results_when_its_network_returns(submit, cluster):
    run = submit("--save_every", "2", "--steps", "30")
    run.wait_for_step(5)
    cluster.set_network("n2", up=False)
    assert run.ends() == "COMPLETED"
    cluster.set_network("n2", up=True)
    cluster.wait_for(lambda: not cluster.tasks("n2"), 180, "the old rank 1 to end")
    assert run.job.results() == [(1, 3 * 435.0)] * 2
    run.assert_every_step_counted_once()


def test_a_requeue_while_the_controller_is_down_is_tried_again(submit, cluster):
    run = submit()
    run.wait_for_step(2)
    cluster.kill_daemon("slurmctld")
    for node in cluster.nodes:  # as the controller's warning would have reached them
        for task in cluster.tasks(node, program=sys.executable):
            os.kill(task, signal.SIGUSR2)
    cluster.wait_for(lambda: f"scontrol requeue {run.id} failed" in run.output(0), 120, "a failed request")
    cluster.start_controller()
    assert run.ends() == "COMPLETED"
    run.assert_every_step_counted_once()


def test_results_are_those_of_the_attempt_that_finished(submit, cluster):
    run = submit(train=jobs.fail_in_the_first_attempt)
    cluster.wait_for(lambda: run.job.task(1).paths.result_pickle.exists())
    # a job that is just coming to its end cannot be requeued; one that has ended can
    cluster.wait_for(lambda: cluster.run("scontrol", "requeue", run.id).returncode == 0, what="the requeue")
    assert run.ends() == "COMPLETED"
    assert run.job.results() == ["attempt 1"] * 2
