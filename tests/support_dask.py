"""Real Dask schedulers and workers on the loopback interface, and programs that use them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from support_cgroups import ControlGroup

# Of tests that start a cluster and programs of their own.
WITH_DASK = [
    pytest.mark.skipif(
        importlib.util.find_spec("distributed") is None,
        reason="distributed is not installed: pip install 'safepool[dask]'",
    ),
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]
_REPOSITORY = Path(__file__).resolve().parent.parent
_START_S = 300.0
# Of a program on a machine that has many times too much to do. A quiet one takes seconds.
_PROGRAM_S = 900.0

# What workers of one machine are told, so that each is a node of its own: the limit that binds is
# another one. Each has one worker.
NODE_A = {"LOKY_MAX_CPU_COUNT": "1"}
NODE_B = {"SLURM_CPUS_PER_TASK": "1"}

_HEAD = """
import json, os, signal, sys, time
from distributed import Client
import safepool, support_inside as inside
from safepool.cluster import ClusterPool, NodeLostError, NoNodesError

def told(**facts):
    print(json.dumps(facts), flush=True)

def await_(holds, what, s=600):
    end = time.monotonic() + s
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.01)
"""


@dataclass(frozen=True)
class Host:
    """What stands for another machine: namespaces of its own for network, processes and name.

    Attributes:
        name: The host's.
        pid: Process id of the process that holds the namespaces.
        address: Of the host; hosts do not reach each other.
        gateway: Of this machine, as the host sees it.
        link: Name of this machine's end of the link.
    """

    name: str
    pid: int
    address: str
    gateway: str
    link: str

    @property
    def inside(self) -> list[str]:
        """What runs a command there."""
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--pid", "--mount", "--"]

    def cut(self) -> None:
        """Take the host off the network."""
        subprocess.run(["ip", "link", "set", self.link, "down"], check=True)

    def has_process(self, pid: int) -> bool:
        """Tell whether a process runs there, by the number that it has there."""
        try:
            stat = Path(f"/proc/{self.pid}/root/proc/{pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] != "Z"


@contextlib.contextmanager
def another_host(number: int) -> Iterator[Host]:
    """Make a host, and end all of its processes after the block."""
    if os.geteuid() or not (shutil.which("ip") and shutil.which("nsenter")):
        pytest.skip("network namespaces need root, and the programs ip and nsenter")
    name, link = f"safepool-{number}", f"safepool{os.getpid() % 100000}{number}"
    net = f"10.231.{os.getpid() % 256}.{4 * number}"
    head = net.rpartition(".")[0]
    host, gateway = f"{head}.{4 * number + 2}", f"{head}.{4 * number + 1}"
    command = "hostname $0 && exec sh -c 'echo; read line'"
    holder = subprocess.Popen(
        ["unshare", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc",
         "sh", "-c", command, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdin is not None
        assert holder.stdout is not None
        if not holder.stdout.readline():
            pytest.skip(f"namespaces cannot be made here: {holder.communicate()[1]!r}")
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text()
        made = Host(name, int(children), host, gateway, link)
        for line in (
            f"ip link add {link} type veth peer name eth0 netns {made.pid}",
            f"ip address add {gateway}/30 dev {link}",
            f"ip link set {link} up",
            f"nsenter --target={made.pid} --net ip address add {host}/30 dev eth0",
            f"nsenter --target={made.pid} --net ip link set eth0 up",
            f"nsenter --target={made.pid} --net ip link set lo up",
        ):
            done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"a network cannot be made here: {line}: {done.stderr.strip()}")
        yield made
    finally:
        holder.kill()
        holder.communicate()
        # Connections that were cut keep the namespace, and so the link, for minutes.
        subprocess.run(["ip", "link", "delete", link], capture_output=True, check=False)


class DaskCluster:
    """A scheduler and its workers. Ended with :func:`dask_cluster`."""

    def __init__(self, folder: Path, host: str) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._file = folder / "scheduler.json"
        self.scheduler = self._start(
            "dask_scheduler", "--host", host, "--port", "0", "--dashboard-address", ":0",
            "--scheduler-file", str(self._file),
        )  # fmt: skip

    def _start(
        self,
        module: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        group: ControlGroup | None = None,
        inside: Sequence[str] = (),
    ) -> subprocess.Popen[bytes]:
        python = [sys.executable, "-W", "ignore", "-m", f"distributed.cli.{module}"]
        command = [*inside, *python, *arguments]
        if group is not None:
            command = group.command(command)
        with (self.folder / f"{len(self._processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={
                    **os.environ,
                    "PYTHONPATH": str(_REPOSITORY),
                    "TMPDIR": str(self.folder),
                    **(env or {}),
                },
            )
        self._processes.append(process)
        return process

    def worker(
        self,
        *,
        nanny: bool = False,
        env: Mapping[str, str] | None = None,
        group: ControlGroup | None = None,
        host: Host | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a worker with two threads."""
        how = "--nanny" if nanny else "--no-nanny"
        if host is None:
            where = ["--scheduler-file", str(self._file), "--host", "127.0.0.1"]
        else:
            port = self.address.rpartition(":")[2]
            where = [f"tcp://{host.gateway}:{port}", "--host", host.address]
        return self._start(
            "dask_worker", how, "--nthreads", "2", "--no-dashboard", *where,
            env=env, group=group, inside=host.inside if host else (),
        )  # fmt: skip

    @property
    def address(self) -> str:
        """Return the scheduler's, when it is there."""
        end = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(OSError, ValueError):
                return str(json.loads(self._file.read_text())["address"])
            assert time.monotonic() < end, self.logs()
            time.sleep(0.02)

    def start_program(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a program that finds the scheduler's address in ``sys.argv[1]``."""
        (self.folder / "program.py").write_text(_HEAD + code)
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "program.py", self.address, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": f"{_REPOSITORY}:{_REPOSITORY / 'tests'}"},
        )

    def run(self, code: str, *arguments: str) -> dict[str, Any]:
        """Run such a program to its end; return what it has told."""
        return self.told_by(self.start_program(code, *arguments))

    def told_by(self, program: subprocess.Popen[str]) -> dict[str, Any]:
        """Wait for the end of a program; return what it has told."""
        try:
            output, _ = program.communicate(timeout=_PROGRAM_S)
        finally:
            program.kill()
            program.wait()
        assert program.returncode == 0, self.logs()
        facts: dict[str, Any] = {}
        for line in output.splitlines():
            facts.update(json.loads(line))
        return facts

    def logs(self) -> str:
        """Return what scheduler and workers have written."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        """End all of it: workers first, that they need not look for their scheduler."""
        for process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def dask_cluster(folder: Path, host: str = "127.0.0.1") -> Iterator[DaskCluster]:
    """Start a scheduler; end it, and its workers, after the block."""
    cluster = DaskCluster(folder, host)
    try:
        yield cluster
    finally:
        cluster.close()
