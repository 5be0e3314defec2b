"""Two hosts that commands are started on (:mod:`.networks`), with stand-ins for ssh, pdsh and srun."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .networks import Network, two_networks

HOSTS = ("node1", "node2")

# pdsh -S -f 1024 -w node1,node2 WORDS: %n is the host's number.
_PDSH = """
import subprocess, sys
words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
command = " ".join(words[words.index("-w") + 2:])
started = [subprocess.Popen(["on-host", h, "sh", "-c", command.replace("%n", str(n))]) for n, h in enumerate(hosts)]
sys.exit(max(process.wait() for process in started))
"""
# ssh [options] HOST WORDS
_SSH = """
import os, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    del words[: 2 if words[0] in ("-o", "-p", "-l") else 1]
os.execvp("on-host", ["on-host", words[0], "sh", "-c", " ".join(words[1:])])
"""
# srun [options] COMMAND in the batch step of a job on both hosts: the variables are those that Slurm 22.05 was seen to set.
_SRUN = """
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
hosts, each = %r, int(os.environ["SLURM_NTASKS_PER_NODE"])
total, started = len(hosts) * each, []
for rank in range(total):
    node, local = divmod(rank, each)
    mine = dict(SLURM_STEP_ID="0", SLURM_STEPID="0", SLURM_PROCID=str(rank), SLURM_LOCALID=str(local),
        SLURM_NODEID=str(node), SLURM_NTASKS=str(total), SLURM_STEP_NUM_TASKS=str(total), SLURM_STEP_NUM_NODES="2",
        SLURM_STEP_NODELIST=os.environ["SLURM_JOB_NODELIST"], SLURM_STEP_TASKS_PER_NODE=f"{each}(x2)")
    started.append(subprocess.Popen(["on-host", hosts[node], *words], env={**os.environ, **mine}))
sys.exit(max(process.wait() for process in started))
"""
_SCONTROL = "print(*%r, sep='\\n')"


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Two hosts, with what they need in an empty ``folder``."""
    with two_networks() as networks:
        yield TwoHosts(folder, networks)


class TwoHosts:
    """Where commands are started."""

    def __init__(self, folder: Path, networks: tuple[Network, ...]) -> None:
        self.programs = folder / "bin"
        self.programs.mkdir()
        cases = "".join(f"    {host.name}) space={host.space} ;;\n" for host in networks)
        _program(
            self.programs / "on-host",
            "/bin/sh",
            f'case "$1" in\n{cases}    *) echo "no host $1" >&2; exit 1 ;;\nesac\n'
            'exec ip netns exec "$space" unshare --uts sh -c \'hostname "$0"; exec "$@"\' "$@"\n',
        )
        for name, text in (
            ("pdsh", _PDSH),
            ("ssh", _SSH),
            ("srun", _SRUN % (HOSTS,)),
            ("scontrol", _SCONTROL % (HOSTS,)),
        ):
            _program(self.programs / name, sys.executable, text)

    def start(self, host: str, command: list[str], cwd: Path, **env: str) -> subprocess.Popen:
        """A command on a host, both of its outputs in one pipe."""
        path = f"{self.programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            own.pop(name, None)
        return subprocess.Popen(
            [str(self.programs / "on-host"), host, *command],
            cwd=cwd,
            env={**own, "PATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def _program(path: Path, interpreter: str, text: str) -> None:
    path.write_text(f"#!{interpreter}\n{textwrap.dedent(text)}")
    path.chmod(0o755)
