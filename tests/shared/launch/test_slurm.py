"""What needs no cluster; jobs on a real one: tests/slurm."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit

from shared.launch import slurm
from shared.run.attempt import Attempt, Interrupted, Superseded
from shared.run.checkpoint import load_latest
from tests.slurm import jobs

ROOT = Path(__file__).resolve().parents[3]


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", default=".")
    parser.add_argument("--lr", type=float, default=0.1)
    slurm.add_slurm_flags(parser, job_name="dino")
    return parser.parse_args(arguments)


@pytest.fixture
def job_environment(tmp_path):
    """The variables of rank 1 of 2 in the second attempt of job 41."""
    handlers = {number: signal.getsignal(number) for number in slurm.STOP_SIGNALS}
    environment = {**os.environ}
    variables = {
        "SUBMITIT_EXECUTOR": "slurm",
        "SUBMITIT_FOLDER": str(tmp_path / "submitit"),
        "SLURM_JOB_ID": "41",
        "SLURM_RESTART_COUNT": "1",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[07-08]",
        "SLURM_NTASKS": "2",
        "SLURM_NODEID": "1",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    }
    os.environ.update(variables)
    yield os.environ
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Writes a shell script that is called in place of the program of its name."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return write


@pytest.fixture
def pauses(monkeypatch):
    """Seconds that were waited for the controller, in no time."""
    pauses = []
    monkeypatch.setattr(slurm, "time", SimpleNamespace(sleep=pauses.append))
    return pauses


# -- flags


def test_the_batch_script_asks_for_what_the_flags_say(tmp_path, program):
    program("srun", "exit 1")
    program("sbatch", f'cp "$1" {tmp_path}/script; echo Submitted batch job 7')
    flags = "--nodes 3 --ngpus 4 --timeout 60 --partition big --use_volta32 --constraint ib --comment deadline"
    options = "--slurm_option account=vision --slurm_option exclusive --slurm_option gres=nvme:1"
    job = slurm.submit(jobs.say_rank, parse("--output_dir", f"{tmp_path}/run-%j", *flags.split(), *options.split()))
    lines = (tmp_path / "script").read_text().splitlines()
    for line in (
        "#SBATCH --nodes=3",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --cpus-per-task=10",
        "#SBATCH --mem=163840M",  # 40 GB per GPU
        "#SBATCH --time=60",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --partition=big",
        "#SBATCH --constraint='volta32gb&ib'",
        "#SBATCH --comment=deadline",
        "#SBATCH --job-name=dino",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --account=vision",
        "#SBATCH --exclusive",
        "#SBATCH --gres=nvme:1",
        f"export PYTHONPATH={ROOT}${{PYTHONPATH:+:$PYTHONPATH}}",
    ):
        assert line in lines
    (srun,) = [line for line in lines if line.startswith("srun")]
    assert "--cpus-per-task=10" in srun
    assert "--kill-on-bad-exit=1" in srun
    assert job.job_id == "7"
    assert job.paths.submitted_pickle == tmp_path / "run-7" / "submitit" / "7_submitted.pkl"


def test_a_dry_run_prints_the_batch_file_and_what_sbatch_says_of_it(tmp_path, monkeypatch, capsys, program):
    parsed = parse(
        "--output_dir", f"{tmp_path}/run-%j", "--dry_run", "--partition", "big", "--slurm_option", "account=me"
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert slurm.submit(jobs.say_rank, parsed) is None
    assert "Partition and account are not checked: there is no sbatch" in capsys.readouterr().out
    program("sbatch", '[ "$1" = --test-only ] && echo "sbatch: Job 8 to start at noon" >&2')
    slurm.submit(jobs.say_rank, parsed)
    printed = capsys.readouterr().out
    for line in ("#SBATCH --partition=big", "#SBATCH --account=me", "#SBATCH --signal=USR2@120"):
        assert line in printed.splitlines()
    assert f"-u -m submitit.core._submit {tmp_path}/run-%j/submitit" in printed
    assert "Not submitted. sbatch: Job 8 to start at noon" in printed and not list(tmp_path.glob("run*"))
    program("sbatch", 'echo "sbatch: error: invalid partition specified: big" >&2; exit 1')
    with pytest.raises(ValueError, match=r"sbatch would refuse the job: .*invalid partition specified: big"):
        slurm.submit(jobs.say_rank, parsed)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"data_path": "{tmp}/photos"}, "--data_path .*photos: no such file or folder"),
        ({"output_dir": "{tmp}/file/run"}, "--output_dir .*file/run: .*/file cannot be written"),
    ],
)
def test_a_dry_run_names_paths_that_do_not_fit(names, message, tmp_path):
    (tmp_path / "file").touch()
    parsed = parse("--output_dir", str(tmp_path), "--dry_run")
    vars(parsed).update({name: value.format(tmp=tmp_path) for name, value in names.items()})
    with pytest.raises(ValueError, match=message):
        slurm.submit(jobs.say_rank, parsed)


def test_a_cpu_job_asks_for_no_gpu(tmp_path, program):
    program("srun", "exit 1")
    program("sbatch", f'cp "$1" {tmp_path}/script; echo Submitted batch job 7')
    slurm.submit(jobs.say_rank, parse("--output_dir", str(tmp_path), "--ngpus", "0"))
    script = (tmp_path / "script").read_text()
    assert "--ntasks-per-node=1\n" in script
    assert "--gpus" not in script


@pytest.mark.parametrize(("ngpus", "device"), [("0", "cpu"), ("8", "cuda")])
def test_the_processes_use_the_device_that_was_asked_for(tmp_path, ngpus, device, program):
    program("srun", "exit 1")
    program("sbatch", "echo Submitted batch job 7")
    args = parse("--output_dir", str(tmp_path), "--ngpus", ngpus)
    args.device = "auto"
    job = slurm.submit(jobs.say_rank, args)
    assert job.submission().function.args.device == device
    args = parse("--output_dir", str(tmp_path), "--ngpus", "8")
    args.device = "cpu"
    with pytest.raises(ValueError, match="--device cpu and --ngpus 8: give --ngpus 0 --tasks_per_node 8"):
        slurm.submit(jobs.say_rank, args)


@pytest.mark.parametrize("dry", [True, False])
def test_a_job_submitted_from_inside_another_one_inherits_nothing_of_it(tmp_path, monkeypatch, program, dry):
    program("srun", "exit 1")
    program("sbatch", f"env > {tmp_path}/environment; echo Submitted batch job 7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    for name in ("SLURM_RESTART_COUNT", "SLURM_MEM_PER_CPU", "SLURMD_NODENAME", "SRUN_DEBUG", "SUBMITIT_EXECUTOR"):
        monkeypatch.setenv(name, "2")
    slurm.submit(jobs.say_rank, parse("--output_dir", str(tmp_path), *["--dry_run"] * dry))
    inherited = (tmp_path / "environment").read_text().splitlines()
    names = ("SLURM", "SRUN", "SUBMITIT")
    assert [line for line in inherited if line.startswith(names)] == ["SLURM_CONF=/etc/slurm.conf"]
    assert os.environ["SLURM_RESTART_COUNT"] == "2"


def test_a_dry_run_comes_before_debug(tmp_path, capsys, program):
    program("sbatch", "true")
    slurm.submit(jobs.write_flags, parse("--output_dir", f"{tmp_path}/run", "--cluster", "debug", "--dry_run"))
    assert "Not submitted" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--slurm_option", "nodes=4"), "use --nodes"),
        (("--slurm_option", "mem=1G"), "use --mem_gb_per_gpu"),
        (("--slurm_option", "ntasks=1"), "use --tasks_per_node"),
        (("--slurm_option", "gpus=1"), "use --ngpus"),
        (("--slurm_option", "gpus-per-task=1"), "use --ngpus"),
        (("--slurm_option", "gres=nvme:1,gpu:2"), "use --ngpus"),
        (("--slurm_option", "array=0-1"), "array=0-1: a job is one training"),
        (("--slurm_option", "no-requeue"), "no-requeue: the job requeues itself"),
        (("--ngpus", "0", "--tasks_per_node", "-1"), "--tasks_per_node -1: expected a number from 1 on"),
        (("--cpus_per_task", "0"), "--cpus_per_task 0"),
        (("--mem_gb_per_gpu", "0"), "--mem_gb_per_gpu 0"),
        (("--mem_gb_per_gpu", "nan"), "--mem_gb_per_gpu nan"),
        (("--signal_delay_s", "-1"), "--signal_delay_s -1"),
        (("--max_restarts", "-1"), "--max_restarts -1"),
        (("--nodes", "0"), "--nodes 0"),
        (("--ngpus", "4", "--tasks_per_node", "2"), "--tasks_per_node 2"),
        (("--timeout", "1", "--signal_delay_s", "60"), "--signal_delay_s 60"),
    ],
)
def test_flags_that_make_no_job_are_refused(tmp_path, arguments, message, program):
    program("srun", "exit 1")
    with pytest.raises(ValueError, match=message):
        slurm.submit(jobs.say_rank, parse("--output_dir", str(tmp_path), *arguments))


def test_a_machine_without_slurm_is_named_as_such(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="--cluster slurm: there is no srun here"):
        slurm.submit(jobs.say_rank, parse("--output_dir", str(tmp_path)))


def test_a_refusal_by_sbatch_is_passed_on(tmp_path, program):
    program("srun", "exit 1")
    program("sbatch", "echo sbatch: error: invalid partition >&2; exit 1")
    with pytest.raises(ValueError, match=r"sbatch refused the job: .*invalid partition"):
        slurm.submit(jobs.say_rank, parse("--output_dir", str(tmp_path)))


# -- the same training without SLURM


def test_debug_trains_in_this_process_without_the_flags_of_the_job(tmp_path):
    assert slurm.submit(jobs.write_flags, parse("--output_dir", f"{tmp_path}/%j", "--cluster", "debug")) is None
    assert (tmp_path / "debug" / "flags.txt").read_text() == "['lr', 'output_dir']"


def test_local_processes_form_one_group(tmp_path):
    flags = ("--cluster", "local", "--ngpus", "0", "--tasks_per_node", "2")
    job = slurm.submit(jobs.sum_over_processes, parse("--output_dir", f"{tmp_path}/runs/%j", *flags))
    assert job.results() == [21.0, 21.0]
    assert job.paths.folder == tmp_path / "runs/submitit"  # the job's own folder is the training's


def test_a_local_process_that_fails_fails_the_job(tmp_path):
    flags = ("--cluster", "local", "--ngpus", "0", "--tasks_per_node", "2")
    with pytest.raises(RuntimeError, match="a message of rank 1"):
        slurm.submit(jobs.fail_on_rank_1, parse("--output_dir", str(tmp_path), *flags))


def test_local_processes_start_again_after_the_warning_signal(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--cluster", "local", "--ngpus", "0", "--tasks_per_node", "2"]
    command = (
        "from shared.launch import slurm; from tests.shared.launch.test_slurm import parse, jobs;"
        f"print(slurm.submit(jobs.wait_for_a_signal_once, parse(*{flags})).results())"
    )
    with subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True) as launcher:
        notes = [tmp_path / f"started-{rank}" for rank in range(2)]
        deadline = time.monotonic() + 60
        while not all(note.exists() and note.read_text() for note in notes) and time.monotonic() < deadline:
            time.sleep(0.1)
        for note in notes:
            os.kill(int(note.read_text()), signal.SIGUSR2)
        output, _ = launcher.communicate(timeout=60)
    assert output.splitlines()[-1] == "['resumed', 'resumed']"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_the_launcher_of_local_processes_saves_and_stops_them(tmp_path, name):
    """SIGINT as from a terminal, to the launcher and its processes."""
    script = (
        "import sys; from shared.launch import slurm; from tests.shared.launch.test_slurm import counting, jobs;"
        "slurm.submit(jobs.count, counting(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as launcher:
        lines, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 60
        while not (lines.exists() and lines.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        (os.killpg if name == "SIGINT" else os.kill)(launcher.pid, getattr(signal, name))
        assert launcher.wait(timeout=60) == 128 + getattr(signal, name)
        with pytest.raises(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert load_latest(tmp_path / "checkpoint.pth")["step"] == len(lines.read_text().splitlines())


def counting(output_dir: str) -> argparse.Namespace:
    args = parse("--output_dir", output_dir, "--cluster", "local", "--ngpus", "0", "--tasks_per_node", "1")
    args.steps, args.step_s, args.save_every = 100, 1.5, 0
    return args


def test_local_processes_are_restarted_no_more_often_than_allowed(tmp_path):
    args = parse("--output_dir", str(tmp_path), "--cluster", "local", "--ngpus", "0", "--max_restarts", "1")
    args.number = signal.SIGUSR2
    with pytest.raises(RuntimeError, match="asked for a restart after --max_restarts 1"):
        slurm.submit(jobs.kill_self, args)
    (output,) = tmp_path.glob("submitit/*_0_log.out")
    assert output.read_text().count("attempt 0: rank 0") == 2


# -- one process of a job


def test_a_process_finds_its_group_by_slurms_variables(job_environment, tmp_path):
    variables = slurm.Trainer(jobs.say_rank, argparse.Namespace(output_dir=str(tmp_path)))()
    port = variables.pop("MASTER_PORT")
    expected = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "node07"}
    assert variables == expected
    assert 10000 <= int(port) < 30000
    os.environ["SLURM_RESTART_COUNT"] = "2"
    again = slurm.Trainer(jobs.say_rank, argparse.Namespace(output_dir=str(tmp_path)))()
    assert again["MASTER_PORT"] != port  # a rank of the attempt before cannot join by mistake


def test_the_job_id_replaces_its_placeholder(job_environment, tmp_path):
    slurm.Trainer(jobs.write_flags, argparse.Namespace(output_dir=f"{tmp_path}/run-%j"))()
    assert (tmp_path / "run-41" / "flags.txt").exists()


def test_results_of_an_earlier_attempt_are_forgotten(job_environment, tmp_path):
    paths = submitit.JobEnvironment().paths
    paths.folder.mkdir()
    half_written = paths.result_pickle.with_suffix(".pkl.save_tmp")
    for stale in (paths.result_pickle, half_written):
        stale.write_bytes(b"error")
    slurm.Trainer(jobs.say_rank, argparse.Namespace(output_dir=str(tmp_path)))()
    assert not paths.result_pickle.exists()
    assert not half_written.exists()


@pytest.mark.parametrize("function", [jobs.say_rank, jobs.fail_on_rank_1])
def test_a_superseded_process_leaves_no_result(job_environment, tmp_path, function):
    Attempt("41", 2).claim(tmp_path)  # SLURM has started the job again on other nodes
    with pytest.raises(Superseded):  # submitit pickles neither a return value nor an error after SystemExit
        slurm.Trainer(function, argparse.Namespace(output_dir=str(tmp_path)))()


def test_an_error_of_the_current_attempt_is_the_result(job_environment, tmp_path):
    Attempt("40", 5).claim(tmp_path)  # an older job used the folder before
    with pytest.raises(ArithmeticError):
        slurm.Trainer(jobs.fail_on_rank_1, argparse.Namespace(output_dir=str(tmp_path)))()


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_rank_0_requeues_the_job_on_a_warning_signal(job_environment, tmp_path, name, program):
    program("scontrol", f"echo $@ >> {tmp_path}/calls")
    os.environ["SLURM_PROCID"] = "0"
    with pytest.raises(SystemExit) as end:
        slurm.Trainer(jobs.kill_self, argparse.Namespace(output_dir=str(tmp_path), number=getattr(signal, name)))()
    assert end.value.code == 0
    assert (tmp_path / "calls").read_text() == "requeue 41\n"


def test_the_other_ranks_end_without_an_error_code_on_a_warning_signal(job_environment, tmp_path):
    with pytest.raises(SystemExit) as end:  # else srun would kill rank 0 before it has requeued the job
        slurm.Trainer(jobs.kill_self, argparse.Namespace(output_dir=str(tmp_path), number=signal.SIGUSR2))()
    assert end.value.code == 0


def after_a_training_loop(args):
    """SIGUSR2 has stopped the training loop; SIGTERM comes while it is on its way out."""
    try:
        raise Interrupted(signal.SIGUSR2)
    finally:
        jobs.kill_self(args)


@pytest.mark.parametrize("function", [jobs.be_warned_and_terminated, after_a_training_loop])
def test_a_warning_that_comes_with_a_termination_requeues(job_environment, tmp_path, program, function):
    program("scontrol", f"echo $@ >> {tmp_path}/calls")
    os.environ["SLURM_PROCID"] = "0"
    args = argparse.Namespace(output_dir=str(tmp_path), number=signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        slurm.Trainer(function, args)()
    assert end.value.code == 0
    assert (tmp_path / "calls").read_text() == "requeue 41\n"


def test_a_job_with_another_number_of_processes_is_an_error(job_environment, tmp_path):
    with pytest.raises(ValueError, match="job 41 has 2 processes instead of 8"):
        slurm.Trainer(jobs.say_rank, argparse.Namespace(output_dir=str(tmp_path)), num_tasks=8)()


def ends_on_termination(program, tmp_path, job_as_scontrol_shows_it: str) -> tuple[SystemExit, str]:
    """How rank 0 ends after SIGTERM, and what it told scontrol."""
    program("scontrol", f"echo $@ >> {tmp_path}/calls; echo '{job_as_scontrol_shows_it}'")
    os.environ["SLURM_PROCID"] = "0"
    with pytest.raises(SystemExit) as end:
        slurm.Trainer(jobs.kill_self, argparse.Namespace(output_dir=str(tmp_path), number=signal.SIGTERM))()
    return end.value, (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    "state", ["JobState=RUNNING PreemptTime=None", "JobState=CANCELLED PreemptTime=2026-11-22T22:59"]
)
def test_a_termination_signal_does_not_requeue(job_environment, tmp_path, program, state):
    end, calls = ends_on_termination(program, tmp_path, state)
    assert isinstance(end, Interrupted)
    assert end.code == 128 + signal.SIGTERM
    assert "requeue" not in calls


def test_a_termination_signal_of_a_preemption_requeues(job_environment, tmp_path, program):
    end, calls = ends_on_termination(
        program, tmp_path, "JobId=41 JobState=RUNNING Reason=None PreemptTime=2026-11-22T22:59:17"
    )
    assert end.code == 0
    assert calls.splitlines() == ["--oneliner show job 41", "requeue 41"]


def test_a_preemption_is_asked_for_until_the_controller_answers(program, tmp_path, pauses):
    answer = "echo JobState=RUNNING PreemptTime=2026"
    program("scontrol", f"[ -e {tmp_path}/asked ] && {answer} || ! touch {tmp_path}/asked")
    assert slurm.is_preempted("41")
    program("scontrol", "echo connect failure >&2; exit 1")
    with pytest.raises(RuntimeError, match="show job 41 failed: connect failure; the state is saved"):
        slurm.is_preempted("41")
    assert pauses == [1, 1, 2, 4, 8, 16]


def test_the_batch_script_of_torchrun_asks_a_busy_controller_again(tmp_path, program):
    program("sleep", "exit 0")
    program("srun", f"env > {tmp_path}/environment; exit 143")
    answer = "show|requeue) ;; --oneliner) [ -e asked ] || ! touch asked || exit 1; echo A=1 PreemptTime=2026"
    program("scontrol", f"echo $@ >> {tmp_path}/calls; case $1 in {answer};; esac")
    variables = {"JOB_ID": "41", "JOB_NODELIST": "n1", "JOB_NUM_NODES": "1", "CPUS_PER_TASK": "2"}
    variables |= {"MEM_PER_NODE": "100", "MEM_PER_CPU": "7"}  # the latter of a job from which this one was submitted
    environment = os.environ | {f"SLURM_{name}": value for name, value in variables.items()}
    done = subprocess.run(["bash", ROOT / "shared/torchrun.sbatch", "main.py"], cwd=tmp_path, env=environment)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[1:] == ["--oneliner show job 41"] * 2 + ["requeue 41"] and done.returncode == 143
    assert "SLURM_MEM_PER_CPU" not in (tmp_path / "environment").read_text()


def test_a_job_restarted_too_often_stays_stopped_and_says_so(job_environment, tmp_path):
    os.environ["SLURM_PROCID"] = "0"
    trainer = slurm.Trainer(jobs.kill_self, argparse.Namespace(output_dir=str(tmp_path), number=signal.SIGUSR2), 1)
    with pytest.raises(RuntimeError, match="restarted 1 times"):
        trainer()


def test_requeueing_is_tried_again_until_the_controller_agrees(tmp_path, program, pauses):
    program("scontrol", f"echo $@ >> {tmp_path}/calls; [ $(wc -l < {tmp_path}/calls) -ge 3 ]")
    slurm.requeue("41")
    assert (tmp_path / "calls").read_text() == "requeue 41\n" * 3
    assert pauses == [1, 2]


def test_a_request_whose_answer_was_lost_counts_once_the_job_is_pending(tmp_path, program, pauses):
    answer = "echo Job is pending execution for job 41 >&2"
    program("scontrol", f"[ -e {tmp_path}/asked ] && {answer}; touch {tmp_path}/asked; exit 1")
    slurm.requeue("41")
    assert pauses == [1]


def test_a_job_that_cannot_be_requeued_fails_with_slurms_reason(program, pauses):
    program("scontrol", "echo requeue is disabled >&2; exit 1")
    with pytest.raises(RuntimeError, match="scontrol requeue 41 failed: requeue is disabled"):
        slurm.requeue("41")


def test_a_signal_before_the_call_requeues_the_same_call():
    trainer = slurm.Trainer(jobs.say_rank, argparse.Namespace(output_dir="."))
    assert trainer.checkpoint().function is trainer


def test_a_function_of_the_script_itself_is_refused(monkeypatch):
    monkeypatch.setattr(jobs.say_rank, "__module__", "__main__")
    with pytest.raises(ValueError, match="say_rank is defined in the script itself"):
        slurm.Trainer(jobs.say_rank, argparse.Namespace(output_dir="."))


def test_a_job_is_ready_for_signals_before_it_imports_torch():
    command = "import sys, shared.launch.slurm; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
