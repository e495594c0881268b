"""Real Dask schedulers and workers on the loopback interface, and programs that use them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from support_cgroups import ControlGroup

_REPOSITORY = Path(__file__).resolve().parent.parent
_START_S = 90.0

# What workers of one machine are told, so that each is a node of its own: the limit that binds is
# another one. Each has one worker.
NODE_A = {"LOKY_MAX_CPU_COUNT": "1"}
NODE_B = {"SLURM_CPUS_PER_TASK": "1"}

_HEAD = """
import json, os, signal, sys, time
from distributed import Client
import safepool
from safepool.cluster import ClusterPool, NodeLostError, NoNodesError

def told(**facts):
    print(json.dumps(facts), flush=True)

def await_(holds, what, s=60):
    end = time.monotonic() + s
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.01)
"""


class DaskCluster:
    """A scheduler and its workers. Ended with :func:`dask_cluster`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._file = folder / "scheduler.json"
        self.scheduler = self._start(
            "dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", ":0"
        )

    def _start(
        self,
        module: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        group: ControlGroup | None = None,
    ) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-W", "ignore", "-m", f"distributed.cli.{module}",
            "--scheduler-file", str(self._file), *arguments,
        ]  # fmt: skip
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
    ) -> subprocess.Popen[bytes]:
        """Start a worker with two threads."""
        how = "--nanny" if nanny else "--no-nanny"
        return self._start(
            "dask_worker", how, "--nthreads", "2", "--no-dashboard", "--host", "127.0.0.1",
            env=env, group=group,
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
            env={**os.environ, "PYTHONPATH": str(_REPOSITORY)},
        )

    def run(self, code: str, *arguments: str) -> dict[str, Any]:
        """Run such a program to its end; return what it has told."""
        program = self.start_program(code, *arguments)
        try:
            output, _ = program.communicate(timeout=100)
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
def dask_cluster(folder: Path) -> Iterator[DaskCluster]:
    """Start a scheduler; end it, and its workers, after the block."""
    cluster = DaskCluster(folder)
    try:
        yield cluster
    finally:
        cluster.close()
