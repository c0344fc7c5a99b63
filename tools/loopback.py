"""A SLURM of two nodes on this machine alone, to try `CLUSTER=loopback` (Debian: slurm-wlm, munge).

    python tools/loopback.py /tmp/slurm     # Ctrl-C ends it

It needs to be root, for a link at /etc/slurm/slurm.conf. No accounts, no data base; a job that
takes more memory than it asked for is killed. `gpu` is a licence here, since a card registers with
no node that is not there.
"""

import argparse
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

# Jobs of Snakemake's executor start without SLURM_CONF, so its commands look here alone.
PLACE = Path("/etc/slurm/slurm.conf")
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
CONF = """ClusterName=uke
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=2
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/controller.pid
SlurmdParameters=config_overrides
MpiDefault=none
MinJobAge=43200
SlurmdTimeout=10
ReturnToService=2
Licenses=gpu:2
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={one} CPUs=1 RealMemory=64000
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={two} CPUs=1 RealMemory=64000
PartitionName=main Nodes=one,two Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Munge, a controller and two nodes, each a process of this one.

    slurm = Slurm(Path("/tmp/slurm"))
    slurm.kill("two")
    slurm.start("two")
    slurm.close()
    """

    def __init__(self, folder: Path) -> None:
        (folder / "state").mkdir(parents=True)
        folder.chmod(0o755)
        given = dict(zip(("controller", "one", "two"), _free_ports(3), strict=True))
        given |= {"folder": folder, "user": getpass.getuser()}
        given |= {"host": socket.gethostname().partition(".")[0]}
        conf, key = folder / "slurm.conf", folder / "munge.key"
        conf.write_text(CONF.format(**given))
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        own = {"key-file": key, "seed-file": folder / "munge.seed"}
        own |= {name: folder / f"munge.{name}" for name in ("socket", "pid-file", "log-file")}
        self.folder, self.running = folder, {}
        self.commands = {
            "munge": ["munged", "-F", "--force", *(f"--{name}={own[name]}" for name in own)],
            "controller": ["slurmctld", "-D", "-f", conf],
            "one": ["slurmd", "-D", "-N", "one", "-f", conf],
            "two": ["slurmd", "-D", "-N", "two", "-f", conf],
        }
        if PLACE.exists() and not PLACE.is_symlink():
            raise FileExistsError(f"{PLACE}: this machine has a SLURM already")
        PLACE.unlink(missing_ok=True)
        PLACE.symlink_to(conf)
        for name in self.commands:
            self.start(name)
            time.sleep(1)

    def start(self, name: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(self.commands[name], stdout=log, stderr=log)

    def kill(self, name: str) -> None:
        self.running[name].kill()
        self.running[name].wait()

    def close(self) -> None:
        for state in ("PENDING", "RUNNING"):
            subprocess.run(["scancel", "--full", f"--state={state}"], timeout=60)
        for name in self.running:
            self.kill(name)
        PLACE.unlink()


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    found = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for its files; it must not exist")
    folder = parser.parse_args().folder.resolve()
    if missing := [name for name in NEEDED if not shutil.which(name)]:
        sys.exit(f"no command {missing[0]}; expected Debian's slurm-wlm and munge")
    slurm = Slurm(folder)
    print("two nodes are up", flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        slurm.close()


if __name__ == "__main__":
    main()
