"""A SLURM of two nodes on one machine, to try profiles/snakemake/slurm without a cluster.

python tests/helpers/one_machine_slurm.py FOLDER

Debian's packages are enough (`apt install slurm-wlm munge`), nothing of them has to be configured or started: key,
configuration, logs and state lie in FOLDER, which must be empty or of an earlier call, and all four daemons end with
this command. The nodes' memory and GPUs are made up, so that stages that ask for 16 GB and a GPU find a place.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NODES = ("one", "two")
DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
# Debian keeps the daemons where a user's PATH does not look.
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CONFIGURATION = """\
ClusterName=onemachine
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# No cgroups, which a container does not give: processes are found by their parents.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
# Memory and GPUs are given out as on a cluster, without looking whether they are there.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=60
# A stage that was warned and has kept what it had ends with this code (pipeline/runtime/cli.py).
RequeueExit=75
MinJobAge=3600
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs that a SLURM needs and this machine does not have."""
    return [name for name in (*DAEMONS, *COMMANDS) if shutil.which(name, path=SEARCH) is None]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for found in sockets:
        found.bind(("127.0.0.1", 0))
    ports = [int(found.getsockname()[1]) for found in sockets]
    for found in sockets:
        found.close()
    return ports


def configure(folder: Path, gpus: int = 1, cpus: int = 8) -> Path:
    """Write key and configuration into `folder`; the path of slurm.conf."""
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    key = folder / "munge.key"
    if not key.exists():
        key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    controller, *ports = _free_ports(1 + len(NODES))
    shape = f"Sockets=1 CoresPerSocket={cpus} RealMemory=64000 Gres=gpu:{gpus}"
    lines = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {shape}"
        for node, port in zip(NODES, ports, strict=True)
    ]
    values = {"folder": folder, "host": host, "user": getpass.getuser(), "controller": controller}
    text = CONFIGURATION.format(**values, nodes="\n".join(lines), names=",".join(NODES))
    (folder / "slurm.conf").write_text(text)
    # SLURM wants a file for each GPU; that it is a device it does not ask where devices are not confined.
    for index in range(gpus):
        (folder / f"gpu{index}").touch()
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-{gpus - 1}]\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    # Snakemake's job step drops SLURM_CONF from the environment, so each command sets it itself.
    (folder / "bin").mkdir(exist_ok=True)
    for name in COMMANDS:
        wrapper = folder / "bin" / name
        wrapper.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which(name)} "$@"\n')
        wrapper.chmod(0o755)
    return folder / "slurm.conf"


@contextmanager
def cluster(folder: Path, gpus: int = 1, cpus: int = 8) -> Iterator[dict[str, str]]:
    """Run a SLURM with its files in `folder`; gives the environment variables that make its commands found.

    RuntimeError with the last lines of the logs where the nodes do not come up within a minute.
    """
    folder = folder.resolve()
    conf = configure(folder, gpus, cpus)
    more = {"PATH": f"{folder}/bin:{os.environ.get('PATH', '')}"}
    environment = {**os.environ, **more, "SLURM_CONF": str(conf)}
    munged = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
    munged += [
        f"--pid-file={folder}/munged.pid",
        f"--seed-file={folder}/munged.seed",
        f"--log-file={folder}/munged.log",
    ]
    commands = [munged, ["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-c", "-N", node] for node in NODES)]
    daemons: list[subprocess.Popen[bytes]] = []
    with (folder / "daemons.log").open("wb") as log:
        try:
            for command in commands:
                program = shutil.which(command[0], path=SEARCH)
                assert program is not None, f"{command[0]} is missing"
                daemons.append(
                    subprocess.Popen([program, *command[1:]], env=environment, stdout=log, stderr=subprocess.STDOUT)
                )
                if command is munged:
                    _until(lambda: (folder / "munge.socket").is_socket(), folder)
            _until(lambda: _idle(environment) == len(NODES), folder)
            yield more
        finally:
            subprocess.run(["scancel", "--user", getpass.getuser()], env=environment, check=False, capture_output=True)
            for daemon in reversed(daemons):
                daemon.terminate()
                try:
                    daemon.wait(30)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()


def _idle(environment: dict[str, str]) -> int:
    told = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"], env=environment, check=False, capture_output=True, text=True
    )
    return told.stdout.split().count("idle")


def _until(condition: object, folder: Path, seconds: float = 60) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = [path for path in sorted(folder.glob("*.log")) if path.stat().st_size]
            told = "\n".join(f"{path}:\n{path.read_text(errors='replace')[-1500:]}" for path in logs)
            raise RuntimeError(f"SLURM did not come up within {seconds:.0f} s\n{told}")
        time.sleep(0.2)


def main() -> None:
    """Run it until Ctrl-C."""
    if len(sys.argv) != 2:
        sys.exit((__doc__ or "").strip())
    if absent := missing():
        sys.exit(f"error: {', '.join(absent)}: not found; Debian has them in slurm-wlm and munge")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with cluster(folder):
        print(f"two nodes are up; in another terminal: export PATH={folder.resolve()}/bin:$PATH", flush=True)
        print("Ctrl-C ends them", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("ended")


if __name__ == "__main__":
    main()
