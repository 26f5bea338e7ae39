"""A real Slurm on this machine for tests: one controller and two nodes, which are two daemons on the one host.

Job numbers, of which rendezvous ports are made, start anywhere, so that several of these may run side by side.
"""
import os
import random
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

NODES_UP_S = 30
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "munged")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser=root
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/node-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/node-%n.log
FirstJobId={first_job}
MaxArraySize=2
SchedulerParameters=bf_interval=1,sched_interval=1
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 Gres=gpu:2 State=UNKNOWN
NodeName={host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=down Nodes=ALL MaxTime=INFINITE State=DOWN
"""


def missing() -> str | None:
    """Why there can be no Slurm here."""
    if absent := [name for name in PROGRAMS if shutil.which(name, path=path()) is None]:
        return f"no {absent[0]} here (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "slurmd wants to be root"
    return None


def path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A running cluster, as SLURM_CONF in the environment; all of it is stopped in the end."""
    if reason := missing():
        pytest.skip(reason)
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0]
    (folder / "ctld").mkdir()
    for gpu in "01":
        (folder / f"gpu{gpu}").touch()                                # of which Slurm only counts the files
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    (folder / "slurm.conf").write_text(CONF.format(
        host=host, folder=folder, ports=free_ports(3), first_job=random.randrange(1, 10_000)))
    before = dict(os.environ)
    os.environ.update(SLURM_CONF=str(folder / "slurm.conf"), PATH=path())
    try:
        munge(folder)
        daemons = (["slurmctld"], ["slurmd", "-N", host], ["slurmd", "-N", f"{host}-2"])
        for command in daemons:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30)
        end = time.monotonic() + NODES_UP_S
        while asked("sinfo", "--noheader", "--format=%T %D").split() != ["idle", "2"]:
            assert time.monotonic() < end, "".join(log.read_text()[-2000:] for log in folder.glob("*.log"))
            time.sleep(0.2)
        yield folder
        subprocess.run(["scancel", "--me", "--signal=KILL"], capture_output=True)
        subprocess.run(["scancel", "--me"], capture_output=True)
    finally:
        for file in folder.glob("**/*.pid"):
            stop(int(file.read_text()))
        os.environ.clear()
        os.environ.update(before)


def munge(folder: Path) -> None:
    """A munged of our own, with a key of its own and a socket in `folder`."""
    own = folder / "munge"
    own.mkdir(mode=0o711)
    (own / "key").write_bytes(os.urandom(128))
    (own / "key").chmod(0o400)
    files = [f"--{option}={own}/{name}" for option, name in (
        ("key-file", "key"), ("socket", "socket"), ("pid-file", "munged.pid"), ("log-file", "log"),
        ("seed-file", "seed"))]
    subprocess.run(["munged", "--force", *files], check=True, capture_output=True, timeout=30)


def stop(pid: int) -> None:
    try:
        os.kill(pid, 15)
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, 9)
    except ProcessLookupError:
        pass


def asked(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
