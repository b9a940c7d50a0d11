"""Training jobs on a SLURM cluster, or on this machine in the same way, through submitit.

A job that has to stop early saves its state into its output folder, comes back and resumes from there:

    what happens                                signal          state saved          back in the queue by
    time limit, ``scancel --signal=USR2``,
    preemption with the job's own signal        USR2 or USR1    after this step      rank 0, ``scontrol requeue``
    preemption                                  TERM            after this step      rank 0, ``scontrol requeue``
    ``scontrol requeue``                        TERM            after this step      SLURM
    ``scancel``                                 TERM            after this step      nobody
    dead host, cut network                      none            last periodic save   SLURM

The training loop (:class:`shared.run.checkpoint.Checkpointer`) turns signals into a save and
:class:`shared.run.attempt.Interrupted`; :class:`Trainer` does the rest. Importing this module imports no torch, for a
job must be ready for signals early.
"""

import argparse
import contextlib
import copy
import importlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import submitit

from shared.run.attempt import Attempt, Interrupted, Superseded, owner_of
from shared.run.command_line import Parser

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
REPOSITORY = Path(__file__).resolve().parents[2]


def add_slurm_flags(parser: argparse.ArgumentParser, job_name: str = "train") -> None:
    """Add what describes the job; all other flags of ``parser`` belong to the training."""
    add = parser.add_argument_group("job").add_argument
    where = "local: processes of this machine, with the same restarts; debug: in this process"
    add("--cluster", default="slurm", choices=("slurm", "local", "debug"), help=where)
    add("--nodes", type=int, default=2, help="number of nodes (slurm)")
    add("--ngpus", type=int, default=8, help="GPUs per node, one process each; 0: train on CPUs")
    add("--tasks_per_node", type=int, default=None, help="processes per node; needed only with --ngpus 0 (default 1)")
    add("--timeout", type=int, default=2800, help="time limit in minutes")
    add("--partition", default="", help="partition to submit to; empty: the cluster's default")
    add("--use_volta32", action="store_true", help="ask for nodes with the feature volta32gb")
    add("--constraint", default="", help="node features to ask for")
    add("--comment", default="", help="comment for the scheduler")
    add("--job_name", default=job_name, help="name in the queue")
    add("--cpus_per_task", type=int, default=10, help="CPU cores per process")
    add("--mem_gb_per_gpu", type=float, default=40, help="host memory per process in GB")
    warning = "seconds between the warning signal and the time limit; SLURM may warn half a minute earlier"
    add("--signal_delay_s", type=int, default=120, help=warning)
    add("--max_restarts", type=int, default=100, help="a job that has been restarted so often does not requeue itself")
    add("--job_dir", default=None, help="submitit's logs and pickles (default: <output_dir>/submitit)")
    options = "any further option of sbatch, e.g. account=vision or exclusive; may be repeated"
    add("--dry_run", action="store_true", help="print the batch file, let sbatch check it, and submit nothing")
    add("--slurm_option", action="append", default=[], metavar="KEY=VALUE", help=options)


def launcher_parser(
    parser: argparse.ArgumentParser, docstring: str, job_name: str, **defaults
) -> argparse.ArgumentParser:
    """The parser of a training with the flags of the job, and the first paragraph of the launcher's docstring."""
    parser.description = docstring.split("\n\n")[0]
    parser.epilog = "The job resumes where it stopped after a preemption or its time limit: it requeues itself."
    add_slurm_flags(parser, job_name)
    parser.set_defaults(**defaults)
    return parser


def with_our_names(words: list[str] | None) -> list[str]:
    """A command line, by default that of the process, with other launchers' names of the job's flags replaced."""
    ours = {"--folder": "--job_dir", "--time": "--timeout", "--tasks-per-node": "--ngpus"}
    parts = [word.partition("=") for word in (sys.argv[1:] if words is None else words)]
    return [ours.get(name, name) + equals + value for name, equals, value in parts]


def submit_training(
    script: ModuleType,
    train: Callable[[argparse.Namespace], object],
    docstring: str,
    arguments: list[str] | None = None,
) -> None:
    """``main`` of a launcher: the flags of a training script and those of the job, then :func:`submit`.

    Args:
        script: Has ``get_args_parser`` and ``parse_args``; the name of its folder is that of the job.
        docstring: Of the launcher.
    """
    from shared import distributed  # imports torch

    parser = launcher_parser(script.get_args_parser(), docstring, script.__name__.partition(".")[0])
    with distributed.clean_exit():
        submit(train, script.parse_args(arguments, parser))


def submit(train: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> submitit.Job | None:
    """Run ``train(args)`` in every process of a new job; the flags of the job itself are taken out of ``args``.

    ``%j`` in ``args.output_dir`` and ``args.job_dir`` becomes the job id. The folder must be visible on all nodes.

    Args:
        train: A function of an importable module.
        args: Parsed flags of the training and of :func:`add_slurm_flags`.

    Returns:
        The submitted job; for ``--cluster local`` it has ended, for ``debug`` there is none.

    Raises:
        ValueError: If the flags do not make a job, or sbatch refuses it.
        RuntimeError: If a local job failed.
    """
    job_flags, training = _split(args)
    _check(job_flags)
    training.output_dir = str(Path(training.output_dir).absolute())
    if job_flags.cluster == "debug" and not job_flags.dry_run:
        train(_with_job_id(training, "debug"))
        return None
    folder = Path(job_flags.job_dir or Path(training.output_dir) / "submitit").absolute()
    tasks = job_flags.tasks_per_node or job_flags.ngpus or 1
    if hasattr(training, "device"):  # asked for GPUs, a process without one must not train on its CPU
        if training.device == "cpu" and job_flags.ngpus:
            raise ValueError(f"--device cpu and --ngpus {job_flags.ngpus}: give --ngpus 0 --tasks_per_node {tasks}")
        training.device = "cuda" if job_flags.ngpus else "cpu"
    num_tasks = tasks * (1 if job_flags.cluster == "local" else job_flags.nodes)
    trainer = Trainer(train, training, job_flags.max_restarts, num_tasks)
    python = f"{_DEAF_START} {shlex.quote(sys.executable)}"
    if job_flags.dry_run:
        _check_paths(training)
        command = f"{python} -u -m submitit.core._submit {shlex.quote(str(folder))}"
        _dry_run(submitit.slurm.slurm._make_sbatch_string(command, folder, **_sbatch_parameters(job_flags, tasks)))
        return None
    if job_flags.cluster == "local":
        return _run_locally(trainer, folder, tasks, job_flags)
    if shutil.which("srun") is None:
        raise ValueError("--cluster slurm: there is no srun here; log in to the cluster or use --cluster local")
    executor = submitit.SlurmExecutor(folder, python=python)
    executor.update_parameters(**_sbatch_parameters(job_flags, tasks))
    try:
        with _environment(_without_enclosing_job()):
            job = executor.submit(trainer)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise ValueError(f"sbatch refused the job: {error}") from error
    output_dir = _with_job_id(training, job.job_id).output_dir
    print(f"Submitted job {job.job_id}: {tasks} processes on each of {job_flags.nodes} nodes")
    print(f"Checkpoints and logs: {output_dir}; output of each process: {job.paths.folder}")
    print(f"To go on with this run in another job, submit the same command with --output_dir {output_dir}")
    return job


def _split(args: argparse.Namespace) -> tuple[argparse.Namespace, argparse.Namespace]:
    """Flags of the job, flags of the training."""
    parser = Parser()
    add_slurm_flags(parser)
    names = vars(parser.parse_args([])).keys()
    job_flags = {name: value for name, value in vars(args).items() if name in names}
    training = {name: value for name, value in vars(args).items() if name not in names}
    return argparse.Namespace(**job_flags), argparse.Namespace(**copy.deepcopy(training))


_LEAST = {
    "nodes": 1,
    "ngpus": 0,
    "tasks_per_node": 1,
    "timeout": 1,
    "cpus_per_task": 1,
    "mem_gb_per_gpu": 1 / 1024,  # sbatch takes 0 MB for all memory of a node
    "signal_delay_s": 0,
    "max_restarts": 0,
}


def _check(flags: argparse.Namespace) -> None:
    for name, least in _LEAST.items():
        value = getattr(flags, name)
        if value is not None and not least <= value < float("inf"):
            raise ValueError(f"--{name} {value}: expected a number from {least} on")
    if flags.tasks_per_node is not None and flags.ngpus not in (0, flags.tasks_per_node):
        raise ValueError(
            f"--tasks_per_node {flags.tasks_per_node}: with --ngpus {flags.ngpus} there is one process per GPU"
        )
    if flags.signal_delay_s >= 60 * flags.timeout:
        raise ValueError(f"--signal_delay_s {flags.signal_delay_s} is longer than --timeout {flags.timeout} minutes")


def _check_paths(training: argparse.Namespace) -> None:
    """Refuse data that are not there and an output folder that cannot be written, seen from this machine."""
    data_path = getattr(training, "data_path", None)
    if data_path and os.sep in data_path and not os.path.exists(os.path.expanduser(data_path)):
        raise ValueError(f"--data_path {data_path}: no such file or folder on this machine")
    folder = Path(training.output_dir.partition("%j")[0])
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"--output_dir {training.output_dir}: {existing} cannot be written on this machine")


def _dry_run(batch_file: str) -> None:
    """Print what would be submitted; sbatch says whether it would take it, partition and account among others."""
    print(batch_file)
    if shutil.which("sbatch") is None:
        print("Not submitted. Partition and account are not checked: there is no sbatch on this machine")
        return
    check = ["sbatch", "--test-only"]
    answer = subprocess.run(check, input=batch_file, capture_output=True, text=True, env=_without_enclosing_job())
    said = " ".join((answer.stdout + answer.stderr).split())
    if answer.returncode:
        raise ValueError(f"sbatch would refuse the job: {said}")
    print(f"Not submitted. {said}")


def _sbatch_parameters(flags: argparse.Namespace, tasks: int) -> dict:
    """Parameters of submitit's SLURM executor."""
    extra = {"requeue": True}  # also where the cluster's default is not to
    for option in flags.slurm_option:
        key, _, value = option.partition("=")
        key = key.replace("-", "_")
        if key in _OPTIONS_WITH_A_FLAG:
            raise ValueError(f"--slurm_option {option}: use --{_OPTIONS_WITH_A_FLAG[key]}")
        if key == "gres" and "gpu" in value:
            raise ValueError(f"--slurm_option {option}: use --ngpus")
        if key in _REFUSED_OPTIONS:
            raise ValueError(f"--slurm_option {option}: {_REFUSED_OPTIONS[key]}")
        extra[key] = value or True
    constraint = "&".join(filter(None, ("volta32gb" if flags.use_volta32 else "", flags.constraint)))
    optional = {"partition": flags.partition, "comment": flags.comment, "constraint": constraint}
    if flags.ngpus:
        optional["gpus_per_node"] = flags.ngpus
    return {
        "job_name": flags.job_name,
        "nodes": flags.nodes,
        "ntasks_per_node": tasks,
        "cpus_per_task": flags.cpus_per_task,
        "mem": f"{int(1024 * flags.mem_gb_per_gpu * tasks)}M",
        "time": flags.timeout,
        "signal_delay_s": flags.signal_delay_s,
        "setup": [f"export PYTHONPATH={shlex.quote(str(REPOSITORY))}${{PYTHONPATH:+:$PYTHONPATH}}"],
        # since SLURM 22.05 srun does not take cpus-per-task from sbatch; a dead rank must not leave the others hanging
        "srun_args": [f"--cpus-per-task={flags.cpus_per_task}", "--kill-on-bad-exit=1"],
        "additional_parameters": extra,
        **{key: value for key, value in optional.items() if value},
    }


# a signal in the half second in which Python starts would end the job for good; unheard, it is followed by SLURM's own
# SIGKILL and requeue
_DEAF_START = """sh -c 'trap "" TERM USR1 USR2; exec "$0" "$@"'"""

_OPTIONS_WITH_A_FLAG = {
    "nodes": "nodes",
    "ntasks_per_node": "tasks_per_node",
    "gpus_per_node": "ngpus",
    "time": "timeout",
    "partition": "partition",
    "constraint": "constraint",
    "comment": "comment",
    "job_name": "job_name",
    "cpus_per_task": "cpus_per_task",
    "mem": "mem_gb_per_gpu",
    "signal": "signal_delay_s",
    "ntasks": "tasks_per_node",
    "gpus": "ngpus",
    "gpus_per_task": "ngpus",
}

_REFUSED_OPTIONS = {
    "array": "a job is one training; submit once per training",
    "no_requeue": "the job requeues itself; --max_restarts 0 keeps it from that",
}


def _run_locally(trainer: "Trainer", folder: Path, tasks: int, flags: argparse.Namespace) -> submitit.Job:
    if "%j" in str(folder):  # which a local process does not know before it has read its files; their names hold the id
        folder = Path(*itertools.takewhile(lambda part: "%j" not in part, folder.parts), "submitit")
    job = submitit.LocalJob(folder, f"{os.getpid()}_{int(time.time())}", tasks=list(range(tasks)))
    job.paths.folder.mkdir(parents=True, exist_ok=True)
    call = submitit.core.utils.DelayedSubmission(trainer)
    call.set_timeout(flags.timeout, flags.max_restarts)
    call.dump(job.paths.submitted_pickle)
    variables = {
        "PYTHONPATH": ":".join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(flags.ngpus))),
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_COMMAND": shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(folder)]),
        "SUBMITIT_LOCAL_NTASKS": str(tasks),
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * flags.timeout),
        "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(flags.signal_delay_s),
        "SUBMITIT_LOCAL_WITH_SHELL": "",
        "SUBMITIT_STDERR_TO_STDOUT": "",
    }
    stops = []

    def pass_on(number: int, frame) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):
            stops.append(number)
            number = signal.SIGTERM  # a terminal sends SIGINT to all: a second one would stop them without saving
        controller._forward_signal(number)

    print(f"Starting job {job.job_id}: {tasks} processes; their output: {job.paths.folder}", flush=True)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with _environment(os.environ | variables):
        controller = submitit.local.local.Controller(folder)
        controller.pid = job.job_id
        for number in STOP_SIGNALS:
            signal.signal(number, pass_on)
        try:
            controller.run(max_retry=flags.max_restarts + 1)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    for rank in range(tasks):
        if not (paths := job.task(rank).paths).result_pickle.exists():  # submitit would wait for it
            if stops:
                raise Interrupted(stops[0])
            again = f"or asked for a restart after --max_restarts {flags.max_restarts}"
            raise RuntimeError(f"process {rank} of the local job was stopped, {again}: see {paths.stderr}")
    error = job.exception()
    if error is not None:
        raise RuntimeError(str(error))
    return job


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    old = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(old)


def _without_enclosing_job() -> dict[str, str]:
    """The environment as it would be outside of a job: a new one would take its restarts and memory for its own."""
    of_jobs, of_clients = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_"), ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
    return {name: text for name, text in os.environ.items() if name in of_clients or not name.startswith(of_jobs)}


def _with_job_id(training: argparse.Namespace, job_id: str) -> argparse.Namespace:
    training = copy.deepcopy(training)
    training.output_dir = training.output_dir.replace("%j", job_id)
    return training


class Trainer:
    """What submitit pickles and calls in every process of the job, in each of its attempts.

    The training function is held by name and imported only when the job is ready for signals: importing torch from a
    busy file system can take longer than a scheduler waits.
    """

    def __init__(
        self, train: Callable, args: argparse.Namespace, max_restarts: int = 100, num_tasks: int | None = None
    ):
        if train.__module__ == "__main__":
            raise ValueError(f"{train.__qualname__} is defined in the script itself; jobs cannot import it from there")
        self.train = (train.__module__, train.__qualname__)
        self.args = args
        self.max_restarts = max_restarts
        self.num_tasks = num_tasks

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """For a signal in the instant before ``__call__``: submitit requeues the same call, nothing is lost yet."""
        return submitit.helpers.DelayedSubmission(self)

    def __call__(self):
        received: list[int] = []

        def interrupt(number: int, frame) -> None:
            received.append(number)
            if len(received) == 1:  # a second one would end the first one's way out
                raise Interrupted(number)

        for number in STOP_SIGNALS:  # from here on ours instead of submitit's; the training loop sets its own
            signal.signal(number, interrupt)
        job = submitit.JobEnvironment()
        attempt = Attempt.current()
        args = _with_job_id(self.args, job.job_id)
        try:
            _forget_results_of_earlier_attempts(job)
            if self.num_tasks not in (None, job.num_tasks):
                raise ValueError(f"job {job.job_id} has {job.num_tasks} processes instead of {self.num_tasks}")
            _export_rendezvous(job, attempt)
            print(
                f"job {job.job_id}, attempt {attempt.number}: rank {job.global_rank} of {job.num_tasks} on "
                f"{job.hostname}, rendezvous at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, output in "
                f"{args.output_dir}",
                flush=True,
            )
            if job.global_rank == 0:
                Path(args.output_dir).mkdir(parents=True, exist_ok=True)
                attempt.claim(args.output_dir)
            module, name = self.train
            result = getattr(importlib.import_module(module), name)(args)
        except Interrupted as stop:
            _ignore_signals()  # inherited by scontrol, which a TERM that follows USR2 would kill
            before = getattr(stop.__context__, "signal_number", None)  # of a training loop on its way out
            self._leave(job, attempt, stop, {stop.signal_number, before, *received})
        except Exception:
            _end_if_superseded(attempt, args.output_dir)
            raise
        finally:
            _ignore_signals()  # Python's exit would reset them, and one that comes late would undo a success
        _end_if_superseded(attempt, args.output_dir)
        return result

    def _leave(self, job: submitit.JobEnvironment, attempt: Attempt, stop: Interrupted, received: set) -> None:
        """End this process after a save; rank 0 puts the job back into the queue where nobody else does."""
        if job.global_rank != 0:
            raise SystemExit(0)  # an exit code would make srun end rank 0 before it has requeued the job
        local = isinstance(job, submitit.local.local.LocalJobEnvironment)
        warned = not received.isdisjoint((signal.SIGUSR1, signal.SIGUSR2))
        if not warned and (local or not is_preempted(job.job_id)):
            raise stop
        if attempt.number >= self.max_restarts:
            raise RuntimeError(
                f"job {job.job_id} was restarted {attempt.number} times (--max_restarts) and stays stopped; its state "
                f"is in {self.args.output_dir}: submit it again to continue"
            )
        if local:
            raise SystemExit(submitit.local.local.LOCAL_REQUEUE_RETURN_CODE)
        requeue(job.job_id)
        raise SystemExit(0)


def is_preempted(job_id: str) -> bool:
    """Whether SLURM is taking the nodes of a running job away.

    A job that ends by itself in the grace time counts as failed or completed, and SLURM does not restart it.

    Raises:
        RuntimeError: If the controller never answered.
    """
    shown = _scontrol("--oneliner", "show", "job", job_id)
    fields = dict(field.split("=", 1) for field in shown.split() if "=" in field)
    # the other states: cancelled or requeued already
    return fields.get("JobState") in ("RUNNING", "SIGNALING") and fields.get("PreemptTime", "")[:1].isdigit()


def requeue(job_id: str) -> None:
    """Put a running job back into the queue.

    Raises:
        RuntimeError: If the controller never agreed, with its last answer.
    """
    # pending: an earlier request was carried out, but its answer was lost
    _scontrol("requeue", job_id, accepts="Job is pending")
    print(f"requeued job {job_id}", flush=True)


def _scontrol(*words: str, accepts: str | None = None, tries: int = 6) -> str:
    """What ``scontrol`` says; a busy controller is asked again after 1, 2, 4, ... seconds.

    Args:
        accepts: An error that is none.
    """
    command = " ".join(("scontrol", *words))
    for i in range(tries):
        try:
            answer = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=30)
        except subprocess.TimeoutExpired as error:
            reason = str(error)
        else:
            if answer.returncode == 0 or (accepts is not None and accepts in answer.stderr):
                return answer.stdout
            reason = answer.stderr.strip()
        print(f"{command} failed: {reason}", flush=True)
        if i + 1 < tries:
            time.sleep(2**i)
    raise RuntimeError(f"{command} failed: {reason}; the state is saved: submit the job again to continue")


def _ignore_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _forget_results_of_earlier_attempts(job: submitit.JobEnvironment) -> None:
    """A rank whose peer died in an earlier attempt left an error that the user would take for this attempt's."""
    result = job.paths.result_pickle
    for path in (result, result.with_suffix(".pkl.save_tmp")):  # submitit refuses to write over a half-written one
        path.unlink(missing_ok=True)


def _export_rendezvous(job: submitit.JobEnvironment, attempt: Attempt) -> None:
    """The variables that torchrun would set; the port is the attempt's own, so that no old rank can join it."""
    port = 10000 + (7 * int(job.job_id.split("_")[0]) + attempt.number) % 20000  # below outgoing connections' ports
    os.environ.update(
        MASTER_ADDR=job.hostnames[0],
        MASTER_PORT=str(port),
        RANK=str(job.global_rank),
        WORLD_SIZE=str(job.num_tasks),
        LOCAL_RANK=str(job.local_rank),
        LOCAL_WORLD_SIZE=str(job.num_tasks // job.num_nodes),  # the memory and cores of a node are shared
    )
    # as torchrun does; else every process starts a thread per core of the node
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))


def _end_if_superseded(attempt: Attempt, output_dir: str) -> None:
    """Leave no result behind if a newer attempt of the same job is running: submitit's file names are the same."""
    owner = owner_of(output_dir)
    if owner is not None and owner.job == attempt.job and owner.number > attempt.number:
        raise Superseded(f"attempt {attempt.number} of job {attempt.job} ends: attempt {owner.number} is running")
