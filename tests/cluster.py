"""A real SLURM with two nodes, stand-in GPUs and accounting on this machine: all its files in one folder."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

DAEMONS = ["munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacctmgr"]
SLURM_CONF = """
ClusterName=pair
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
KillWait=30
MinJobAge=3600
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=4 RealMemory=4000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=4 RealMemory=4000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20 OverSubscribe=NO
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""
ENDS = ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEPENDENCY"]
DBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={mysql}
StorageUser=slurm
StoragePass=slurm
StorageLoc=accounting
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
"""


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    if os.geteuid() != 0:
        return "a SLURM of one's own needs root"
    lacking = [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    return f"not installed: {', '.join(lacking)} (slurm-wlm munge slurmdbd mariadb-server)" if lacking else ""


def until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} within {seconds:.0f} s"
        time.sleep(0.1)


class Cluster:
    """Started at once; `close` ends every daemon. Clients need SLURM_CONF, which is set for this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.host = folder, socket.gethostname().split(".")[0]
        self.daemons: list[subprocess.Popen[bytes]] = []
        os.environ["PATH"] += ":/usr/sbin:/sbin"
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        folder = self.folder
        with contextlib.ExitStack() as probes:  # all at once, so that they differ
            names = ("ctld", "dbd", "n1", "n2", "mysql")
            sockets = [probes.enter_context(socket.socket()) for _ in names]
            for probe in sockets:
                probe.bind(("127.0.0.1", 0))
            ports = {name: probe.getsockname()[1] for name, probe in zip(names, sockets, strict=True)}
        values = dict(folder=folder, host=self.host, **ports)
        for name in ("state", "spool-n1", "spool-n2", "mysql"):
            (folder / name).mkdir()
        for number in (0, 1):
            if not (gpu := folder / f"gpu{number}").exists():
                os.mknod(gpu, 0o666 | 0o020000, os.makedev(1, 3))  # as /dev/null
        (folder / "slurm.conf").write_text(SLURM_CONF.format(**values))
        (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-1]\n")
        (folder / "slurmdbd.conf").write_text(DBD_CONF.format(**values))
        (folder / "slurmdbd.conf").chmod(0o600)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        self.spawn("munged", "--foreground", "--force", f"--key-file={folder}/munge.key",
                   f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid",
                   f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed",
                   "--num-threads=10")
        mysql = ["--no-defaults", f"--datadir={folder}/mysql", "--user=root"]
        self.ask("mariadb-install-db", *mysql, "--auth-root-authentication-method=normal", "--skip-test-db")
        self.spawn("mariadbd", *mysql, f"--socket={folder}/mysql.socket", f"--port={ports['mysql']}",
                   "--bind-address=127.0.0.1", "--innodb-buffer-pool-size=32M")
        client = ["mariadb", "--no-defaults", f"--socket={folder}/mysql.socket", "--user=root"]
        until(lambda: subprocess.run([*client, "-e", "select 1"], capture_output=True).returncode == 0, "database")
        for place in ("localhost", "127.0.0.1"):
            user = f"'slurm'@'{place}'"
            self.ask(*client, "-e", f"create user {user} identified by 'slurm'; grant all on accounting.* to {user}")
        self.spawn("slurmdbd", "-D")
        until(lambda: subprocess.run(["sacctmgr", "-n", "list", "cluster"], capture_output=True).returncode == 0, "dbd")
        self.ask("sacctmgr", "-i", "add", "cluster", "pair")
        self.spawn("slurmctld", "-D")
        until(lambda: "UP" in subprocess.run(["scontrol", "ping"], capture_output=True, text=True).stdout, "slurmctld")
        for name in ("n1", "n2"):
            self.node(name)
        until(lambda: self.ask("sinfo", "-N", "-h", "-p", "main", "-o", "%t").split() == ["idle", "idle"], "idle nodes")

    def node(self, name: str) -> subprocess.Popen[bytes]:
        """Start a node's slurmd, in a session of its own."""
        return self.spawn("slurmd", "-D", "-N", name)

    def spawn(self, *command: str) -> subprocess.Popen[bytes]:
        out = (self.folder / f"{command[0]}.out").open("ab")
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True)
        self.daemons.append(process)
        return process

    def ask(self, *command: str) -> str:
        """The output of a command that has to succeed."""
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout

    def state(self, job: str) -> str:
        """Such as PENDING, RUNNING, COMPLETED; "" once forgotten."""
        show = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True).stdout
        return show.split("JobState=")[1].split()[0] if "JobState=" in show else ""

    def wait(self, job: str, *states: str, seconds: float = 120) -> None:
        """Until the job is in one of these states; a requeued job's delay is cut short."""

        def arrived() -> bool:
            now = self.state(job)
            assert now in states or now not in ENDS, f"job {job} is {now}"
            if now == "PENDING":
                subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], capture_output=True)
            return now in states

        until(arrived, f"{states} of job {job}", seconds)

    def close(self) -> None:
        subprocess.run(["scancel", "--user=root", "--signal=KILL"], capture_output=True)
        subprocess.run(["scontrol", "shutdown"], capture_output=True)
        for process in reversed(self.daemons):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def kill_node(self, name: str) -> None:
        """What is left of a node whose power fails: neither its slurmd nor anything of its jobs."""
        for process in self.daemons:
            if list(process.args)[-2:] == ["-N", name] and process.poll() is None:  # type: ignore[arg-type]
                process.kill()
                process.wait()
        for place in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                words = (place / "environ").read_bytes().decode(errors="replace").split("\0")
                if f"SLURMD_NODENAME={name}" in words and f"SLURM_CONF={self.folder}/slurm.conf" in words:
                    parent = int((place / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    for number in (parent, int(place.name)):  # slurmstepd first: it would tell slurmctld
                        if number > 1:
                            os.kill(number, signal.SIGKILL)
