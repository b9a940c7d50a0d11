"""A private SLURM cluster on this machine: real daemons, one network namespace per node, all state in one folder.

Needs root, network namespaces, and Debian's ``slurmctld slurmd slurm-client munge`` (``.ci/install_slurm.sh``).
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

CLIENTS = ("sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
PROGRAMS = (*CLIENTS, "munged", "mungekey", "slurmctld", "slurmd", "ip")

# `sacct` needs a data base; what submitit asks of it, squeue can answer (MinJobAge keeps ended jobs there)
SACCT = r"""#!/bin/sh
jobs=
while [ $# -gt 0 ]; do
    case "$1" in -j) jobs="$jobs,$2"; shift ;; esac
    shift
done
echo 'JobID|State|NodeList'
squeue --noheader --array --states=all --format='%i|%T|%N' --jobs="${jobs#,}"
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "the SLURM daemons must be started by root"
    if absent := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"not installed (.ci/install_slurm.sh): {', '.join(absent)}"
    if subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], stderr=subprocess.DEVNULL).returncode != 0:
        return "network namespaces are not allowed"
    return None


class Cluster:
    """Nodes n1, n2, ... of 8 CPUs, 4 GB and 8 pretended GPUs; partition ``high`` preempts partition ``main``.

    Args:
        folder: Empty folder for configuration, keys, logs and state; its path must be short (UNIX sockets).
        num_nodes: Number of node daemons.
    """

    def __init__(self, folder: Path, num_nodes: int = 3):
        self.folder = folder
        self.nodes = [f"n{i}" for i in range(1, num_nodes + 1)]
        self.namespaces: dict[str, subprocess.Popen] = {}  # a sleeping process holds each one
        self.daemons: dict[str, subprocess.Popen] = {}
        self.config = folder / "slurm.conf"
        # what a process needs to talk to this cluster
        self.environment = {"SLURM_CONF": str(self.config), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}

    def start(self) -> None:
        self.folder.chmod(0o755)  # munged wants its socket reachable by every user
        for name in ("munge", "state", "log", "bin", "gpus", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        self._make_namespaces()
        self._write_config()
        self._write_clients()
        self._start_munged()
        self._start("slurmctld", "controller", "slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for(self.is_idle, what="all nodes to be idle")

    def start_controller(self) -> None:
        """Start the controller again with the state it left."""
        self._start("slurmctld", "controller", "slurmctld", "-D")

    def start_node(self, node: str) -> None:
        self._start(node, node, "slurmd", "-D", "-N", node)

    def is_idle(self) -> bool:
        return self.run("sinfo", "-h", "-p", "main", "-o", "%D%t").stdout == f"{len(self.nodes)}idle\n"

    def repair(self) -> None:
        """Plug in every cable, start daemons that were killed, and put the nodes back to work."""
        if self.daemons["slurmctld"].poll() is not None:
            self.start_controller()
            self.wait_for(lambda: self.run("scontrol", "ping").returncode == 0, what="the controller")
        self.run("scancel", "--user=root")
        for node in self.nodes:
            self.set_network(node, up=True)
            if self.daemons[node].poll() is not None:
                self.start_node(node)

        def idle() -> bool:
            for node in self.nodes:
                self.run("scontrol", "update", f"nodename={node}", "state=resume")
            return self.is_idle()

        self.wait_for(idle, 120, "the nodes to be repaired")

    def run(self, *command: str, timeout_s: float = 60, **options) -> subprocess.CompletedProcess:
        """Run a client program as a user of the login node would."""
        environment = {**os.environ, **self.environment}
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, **options)

    def show(self, job_id: str) -> dict[str, str]:
        """The fields of ``scontrol show job``."""
        text = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def state(self, job_id: str) -> str:
        """The job's state in ``squeue``, e.g. PENDING, RUNNING, COMPLETED."""
        return self.run("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job_id}").stdout.strip()

    def wait_for_state(self, job_id: str, *states: str, timeout_s: float = 180) -> str:
        self.wait_for(lambda: self.state(job_id) in states, timeout_s, f"job {job_id} to be {' or '.join(states)}")
        return self.state(job_id)

    def wait_for(self, condition, timeout_s: float = 120, what: str = "the cluster") -> None:
        """Poll until ``condition()`` holds.

        Raises:
            TimeoutError: With the end of the controller's log and the queue, after ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                log = "".join(path.read_text()[-3000:] for path in self.folder.glob("log/slurmctld.log"))
                queue = self.run("squeue", "--states=all").stdout
                raise TimeoutError(f"waited {timeout_s} s for {what}\n{log}\n{queue}")
            time.sleep(0.1)

    def kill_node(self, node: str) -> None:
        """The host dies: its daemon, its job steps and their tasks end by SIGKILL, at once and unannounced."""
        self.kill_daemon(node)
        for pid, environment in self._processes():
            if f"SLURMD_NODENAME={node}" in environment:
                for victim in (_parent(pid), pid):  # the step daemon first, so that it reports nothing
                    if victim is not None and (victim == pid or "slurmstepd" in _name(victim)):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(victim, signal.SIGKILL)

    def kill_daemon(self, name: str) -> None:
        self.daemons[name].kill()
        self.daemons[name].wait()

    def tasks(self, node: str, program: str = "") -> list[int]:
        """Ids of the jobs' processes on a node, of those that run ``program`` if it is given."""
        processes = [pid for pid, environment in self._processes() if f"SLURMD_NODENAME={node}" in environment]
        return [pid for pid in processes if _name(pid).startswith(program)]

    def kill_tasks(self, node: str) -> None:
        """SIGKILL to them, as the kernel does when memory runs out."""
        for pid in self.tasks(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def preempt(self) -> None:
        """A more important job takes all nodes for an instant."""
        options = ("--partition=high", f"--nodes={len(self.nodes)}", "--exclusive", "--output=/dev/null")
        self.run("sbatch", *options, "--wrap=true", check=True)

    @contextlib.contextmanager
    def without(self, option: str) -> Iterator[None]:
        """The cluster as it is configured without this line."""
        complete = self.config.read_text()
        self._reconfigure("".join(line for line in complete.splitlines(True) if not line.startswith(f"{option}=")))
        try:
            yield
        finally:
            self._reconfigure(complete)

    def _reconfigure(self, text: str) -> None:
        self.config.write_text(text)
        self.run("scontrol", "reconfigure")

    def set_network(self, node: str, up: bool) -> None:
        """Plug the node's cable in or out."""
        link = f"v{self.nodes.index(node) + 1}"
        self._ip("controller", f"link set {link} {'up' if up else 'down'}")

    def stop(self) -> None:
        """End jobs, daemons and namespaces; nothing started by this cluster survives."""
        if "slurmctld" in self.daemons:
            with contextlib.suppress(subprocess.TimeoutExpired, TimeoutError):
                self.run("scancel", f"--user={os.environ.get('USER', 'root')}")
                self.wait_for(lambda: not self.run("squeue", "--noheader").stdout, timeout_s=10)
        for name in ("slurmctld", *self.nodes, "munged"):
            if name in self.daemons:
                self.daemons[name].terminate()
        for daemon in self.daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=10)
        for pid, _ in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in (*self.daemons.values(), *self.namespaces.values()):
            process.kill()
            process.wait()

    # -- parts

    def _make_namespaces(self) -> None:
        """A switch in the controller's namespace and a cable from it to each node; nothing of it is visible outside."""
        hosts = self.folder / "hosts"
        addresses = {node: f"10.77.0.{i}" for i, node in enumerate(self.nodes, 1)} | {"ctl": "10.77.0.254"}
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in addresses.items()))
        self._make_namespace("controller", "ctl", hosts)
        self._ip("controller", "link add br0 type bridge", f"addr add {addresses['ctl']}/24 dev br0", "link set br0 up")
        for i, node in enumerate(self.nodes, 1):
            self._make_namespace(node, node, hosts)
            cable = f"link add v{i} type veth peer name eth0 netns {self.namespaces[node].pid}"
            self._ip("controller", cable, f"link set v{i} master br0 up")
            self._ip(node, f"addr add {addresses[node]}/24 dev eth0", "link set eth0 up")

    def _ip(self, name: str, *commands: str) -> None:
        for command in commands:
            subprocess.run([*self._inside(name), "ip", *command.split()], check=True, capture_output=True)

    def _make_namespace(self, name: str, hostname: str, hosts: Path) -> None:
        ready = self.folder / f"ready.{hostname}"
        script = (
            f"hostname {hostname} && ip link set lo up && mount --bind {hosts} /etc/hosts"
            f" && touch {ready} && exec sleep infinity"
        )
        process = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "setpriv", "--pdeathsig", "KILL", "sh", "-c", script],
            stderr=subprocess.DEVNULL,
        )
        self.namespaces[name] = process
        while not ready.exists():
            if process.poll() is not None:
                raise subprocess.CalledProcessError(process.returncode, "unshare")
            time.sleep(0.01)

    def _inside(self, name: str) -> list[str]:
        return ["nsenter", f"--target={self.namespaces[name].pid}", "--net", "--uts", "--mount", f"--wd={os.getcwd()}"]

    def _write_config(self) -> None:
        folder, count = self.folder, len(self.nodes)
        for i in range(8):
            (folder / "gpus" / f"nvidia{i}").touch()
        (folder / "gres.conf").write_text(f"NodeName=n[1-{count}] Name=gpu File={folder}/gpus/nvidia[0-7]\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self.config.write_text(
            f"""
ClusterName=ci
SlurmctldHost=ctl(10.77.0.254)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits for the credential to expire: 120 s by default
AuthInfo=socket={folder}/munge/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
ReturnToService=2
JobRequeue=1
KillWait=30
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout=10
BatchStartTimeout=30
MessageTimeout=5
DefMemPerCPU=256
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT Port=16818 CPUs=8 CoresPerSocket=8 RealMemory=4096 Gres=gpu:8 State=UNKNOWN
NodeName=n[1-{count}] NodeAddr=10.77.0.[1-{count}]
PartitionName=main Nodes=n[1-{count}] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=n[1-{count}] PriorityTier=10 PreemptMode=OFF
"""
        )

    def _write_clients(self) -> None:
        """Clients that enter the controller's network, first on PATH; jobs find the real ones, and this Python."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        for name in CLIENTS:
            enter = " ".join(self._inside("controller")).replace(f"--wd={os.getcwd()}", '--wd="$PWD"')
            program = self.folder / "bin" / name
            program.write_text(f'#!/bin/sh\nPATH="{path}" exec {enter} {shutil.which(name)} "$@"\n')
            program.chmod(0o755)
        sacct = self.folder / "bin" / "sacct"
        sacct.write_text(SACCT)
        sacct.chmod(0o755)

    def _start_munged(self) -> None:
        munge = self.folder / "munge"
        subprocess.run(["mungekey", "-c", "-k", str(munge / "munge.key")], check=True)
        options = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._start("munged", None, "munged", "--foreground", *(f"--{o}={munge}/munge.{f}" for o, f in options.items()))
        self.wait_for((munge / "munge.socket").exists, 30, "munged")

    def _start(self, name: str, namespace: str | None, *command: str) -> None:
        enter = self._inside(namespace) if namespace else []
        with open(self.folder / "log" / f"{name}.out", "ab") as output:
            self.daemons[name] = subprocess.Popen(
                [*enter, "setpriv", "--pdeathsig", "KILL", *command],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "SLURM_CONF": str(self.config)},
                start_new_session=True,
            )

    def _processes(self) -> Iterator[tuple[int, list[str]]]:
        """Every live process that was started with this cluster's configuration, with its environment."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    environment = (entry / "environ").read_text(errors="replace").split("\0")
                    if f"SLURM_CONF={self.config}" in environment:
                        yield int(entry.name), environment


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    return None


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "cmdline").read_text()
    return ""
