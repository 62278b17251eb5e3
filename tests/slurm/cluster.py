"""A real Slurm cluster of two nodes on this machine, as a context manager.

with cluster(folder) as slurm:
    job = slurm.submit(...)
    slurm.wait(job, "COMPLETED")

Needs root and Debian's packages: apt-get install --no-install-recommends slurm-wlm munge
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONF = """
ClusterName=mone
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
KillWait=60
MinJobAge=300
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 MaxTime=INFINITE State=UP
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    """User commands of the cluster: sbatch, squeue, scontrol and scancel find it by SLURM_CONF."""

    folder: Path

    def shown(self, job: str) -> str:
        """The output of `scontrol show job`."""
        return subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True).stdout

    def state(self, job: str) -> str:
        """JobState."""
        found = re.search(r"JobState=(\w+)", self.shown(job))
        return found[1] if found else "UNKNOWN"

    def restarts(self, job: str) -> int:
        """Number of times that the job was requeued."""
        found = re.search(r"Restarts=(\d+)", self.shown(job))
        return int(found[1]) if found else 0

    def start_now(self, job: str) -> None:
        """Remove the delay of two minutes of a requeued job."""
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True)

    def wait(self, job: str, *states: str, seconds: float = 600) -> str:
        """Wait for one of these states and return it; a requeued job starts without delay."""
        began, released = time.monotonic(), 0
        while (state := self.state(job)) not in states:
            assert time.monotonic() - began < seconds, f"{self.shown(job)}\n{self.logs()}"
            if state == "PENDING" and (restarts := self.restarts(job)) > released:
                time.sleep(2)  # in the same second, its credential would count as revoked
                self.start_now(job)
                released = restarts  # Slurm waits for its next scheduling cycle after each change of the start time
            time.sleep(0.3)
        return state

    def logs(self) -> str:
        """The end of the daemons' logs."""
        return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))


def free_ports(number: int) -> list[int]:
    """Consecutive free ports."""
    for first in range(21000, 30000, 50):
        with contextlib.ExitStack() as sockets:
            try:
                for port in range(first, first + number):
                    sockets.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return list(range(first, first + number))
    raise RuntimeError("no free ports")


def why_not() -> str | None:
    """The reason why Slurm cannot be started here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [program for program in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(program) is None]
    return f"no {', '.join(missing)}: apt-get install --no-install-recommends slurm-wlm munge" if missing else None


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Start the daemons, wait until both nodes are idle, and end them."""
    folder.mkdir(parents=True)
    (folder / "state").mkdir()
    port, first, second = free_ports(3)
    conf, key = folder / "slurm.conf", folder / "munge.key"
    conf.write_text(CONF.format(folder=folder, port=port, first=first, second=second))
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(conf)
    pids = {name: folder / f"{name}.pid" for name in ("munged", "slurmctld", "slurmd.n1", "slurmd.n2")}
    slurm = Slurm(folder)
    try:
        munged = ["munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock", f"--pid-file={pids['munged']}"]
        munged += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
        for command in (
            munged,
            ["slurmctld", "-c", "-f", str(conf)],
            ["slurmd", "-N", "n1", "-f", str(conf)],
            ["slurmd", "-N", "n2", "-f", str(conf)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=180)
            assert done.returncode == 0, f"{command}: {done.stderr}"
        began = time.monotonic()
        idle = ["sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D"]
        while subprocess.run(idle, capture_output=True, text=True).stdout.strip() != "2":
            assert time.monotonic() - began < 180, slurm.logs()
            time.sleep(0.2)
        yield slurm
    finally:
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        for name in ("slurmd.n1", "slurmd.n2", "slurmctld", "munged"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
                os.kill(int(pids[name].read_text()), signal.SIGTERM if name == "munged" else signal.SIGKILL)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
