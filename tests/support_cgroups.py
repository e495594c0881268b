"""Real control groups for tests: made, filled, changed, and always removed.

Version 1 with a mounted ``cpu`` hierarchy, or version 2 with the controller delegated.
A test that asks for a group is skipped, with the reason, where none can be made.

    with control_group(cpus=1.5) as group:
        print(group.run("import safepool.limits; print(safepool.limits.read_limits().cpu_quota)"))

Not covered: machines where only a part of the tree is ours (rootless containers).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PREFIX = "safepool-test-"
PERIOD_US = 100_000

_CONTROLLERS = ("cpu", "memory", "pids")
_TESTS = Path(__file__).resolve().parent
_REPOSITORY = _TESTS.parent
_REMOVE_SECONDS = 30.0
_number = itertools.count()


@dataclass(frozen=True, kw_only=True)
class ControlGroup:
    """One group in every hierarchy that is mounted.

    Attributes:
        version: 1 or 2.
        directories: Its directory for each controller; on version 2 they are the same.
        environ: Added to the environment of every process that is started in it.
    """

    version: int
    directories: Mapping[str, Path]
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def cpu(self) -> Path:
        """The directory with the CPU quota."""
        return self.directories["cpu"]

    def set_cpus(self, cpus: float | None) -> None:
        """Write the quota, in CPUs; ``None`` is no quota."""
        quota = None if cpus is None else round(cpus * PERIOD_US)
        if self.version == 2:
            self._write("cpu", "cpu.max", f"{'max' if quota is None else quota} {PERIOD_US}")
        else:
            self._write("cpu", "cpu.cfs_period_us", str(PERIOD_US))
            self._write("cpu", "cpu.cfs_quota_us", str(-1 if quota is None else quota))

    def set_memory(self, limit_bytes: int) -> None:
        """Write the ceiling on memory."""
        name = "memory.max" if self.version == 2 else "memory.limit_in_bytes"
        self._write("memory", name, str(limit_bytes))

    def set_tasks(self, tasks: int | None) -> None:
        """Write the ceiling on processes and threads; ``None`` is none."""
        self._write("pids", "pids.max", "max" if tasks is None else str(tasks))

    def tasks(self) -> int:
        """Return how many processes and threads are in it."""
        return int((self.directories["pids"] / "pids.current").read_text())

    def oom_kills(self) -> int:
        """Return how many processes the kernel has killed in it for want of memory."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        lines = (self.directories["memory"] / name).read_text().splitlines()
        return int(dict(line.split() for line in lines).get("oom_kill", 0))

    def add(self, pid: int) -> None:
        """Move a process here."""
        for directory in set(self.directories.values()):
            (directory / "cgroup.procs").write_text(str(pid))

    def add_thread(self, native_id: int) -> None:
        """Move one thread here (version 1; a threaded group on version 2)."""
        name = "tasks" if self.version == 1 else "cgroup.threads"
        (self.cpu / name).write_text(str(native_id))

    def command(self, arguments: Sequence[str], *, before: str = ":") -> list[str]:
        """Build a command that enters the group and only then runs ``arguments``.

        Args:
            arguments: Program and arguments.
            before: A shell command that is run in the group first, such as a mount.
        """
        files = sorted({str(path / "cgroup.procs") for path in self.directories.values()})
        enter = " && ".join(f'echo $$ > "${index}"' for index in range(1, len(files) + 1))
        script = f'{enter} && shift {len(files)} && {before} && exec "$@"'
        return ["sh", "-c", script, "sh", *files, *arguments]

    def popen(self, arguments: Sequence[str], *, before: str = ":") -> subprocess.Popen[str]:
        """Start a program in the group, with pipes for its input and output."""
        return subprocess.Popen(
            self.command(arguments, before=before),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.environ, "PYTHONPATH": f"{_REPOSITORY}:{_TESTS}"},
        )

    def run(self, code: str, *arguments: str, before: str = ":", timeout_s: float = 60) -> str:
        """Run Python code in a new process in the group.

        Args:
            code: The program.
            arguments: Its ``sys.argv[1:]``.
            before: As for `command`.
            timeout_s: After this it is killed and the test fails.

        Returns:
            What it printed, without the last newline.
        """
        program = self.popen([sys.executable, "-c", code, *arguments], before=before)
        try:
            output, _ = program.communicate(timeout=timeout_s)
        finally:
            program.kill()
            program.wait()
        assert program.returncode == 0, f"the child ended with {program.returncode}: {output}"
        return output.rstrip("\n")

    def _write(self, controller: str, name: str, text: str) -> None:
        if controller not in self.directories:
            pytest.skip(f"no {controller} controller here")
        (self.directories[controller] / name).write_text(text)


@contextlib.contextmanager
def control_group(
    *,
    cpus: float | None = None,
    memory_bytes: int | None = None,
    tasks: int | None = None,
    inside: ControlGroup | None = None,
    suffix: str = "",
    environ: Mapping[str, str] | None = None,
) -> Iterator[ControlGroup]:
    """Make one control group, and remove it at the end with all that is in it.

    Args:
        cpus: Its CPU quota; ``None`` writes none.
        memory_bytes: Its ceiling on memory.
        tasks: Its ceiling on processes and threads.
        inside: The group to make it in; without one it lies at the top of the hierarchy.
        suffix: Added to its name.
        environ: Added to the environment of what is started in it.
    """
    version, tops = _hierarchies()
    name = f"{PREFIX}{os.getpid()}-{next(_number)}{suffix}"
    parents = inside.directories if inside is not None else tops
    group = ControlGroup(
        version=version,
        directories={controller: parent / name for controller, parent in parents.items()},
        environ=environ or {},
    )
    try:
        if version == 2:
            _delegate(next(iter(parents.values())))
        for directory in sorted(set(group.directories.values())):
            directory.mkdir()
        if cpus is not None:
            group.set_cpus(cpus)
            come_first(group.cpu)
        if memory_bytes is not None:
            group.set_memory(memory_bytes)
        if tasks is not None:
            group.set_tasks(tasks)
        yield group
    finally:
        for directory in sorted(set(group.directories.values())):
            _remove(directory)


def come_first(directory: Path) -> None:
    """Let a group be served before its neighbours: it uses its quota on a busy machine, too."""
    for name, most in (("cpu.weight", "10000"), ("cpu.shares", "262144")):
        if (directory / name).exists():
            (directory / name).write_text(most)


def without_control_groups() -> str | None:
    """Say why no control group can be made here; ``None`` if one can."""
    if sys.platform != "linux":
        return "control groups are Linux's"
    if os.geteuid() != 0:
        return "making control groups needs root"
    mounted = _mounted()
    if "cpu" not in mounted:
        return "no mounted hierarchy has the cpu controller"
    if not os.access(mounted["cpu"][1], os.W_OK):
        return f"{mounted['cpu'][1]} is not writable"
    return None


def _hierarchies() -> tuple[int, dict[str, Path]]:
    reason = without_control_groups()
    if reason is not None:
        pytest.skip(reason)
    mounted = _mounted()
    version = mounted["cpu"][0]
    return version, {name: path for name, (of, path) in mounted.items() if of == version}


def _mounted() -> dict[str, tuple[int, Path]]:
    """Find the top directory of every controller, by the simplest reading that can be right.

    Not by the code under test: a mistake in it must not choose the place of its own test.
    """
    found: dict[str, tuple[int, Path]] = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind, options, *_ = line.split(" ")
        if kind == "cgroup":
            found.update(
                {name: (1, Path(point)) for name in _CONTROLLERS if name in options.split(",")}
            )
        elif kind == "cgroup2":
            controllers = Path(point, "cgroup.controllers").read_text().split()
            for name in _CONTROLLERS:
                if name in controllers:
                    found.setdefault(name, (2, Path(point)))
    return found


def _delegate(parent: Path) -> None:
    wanted = " ".join(f"+{name}" for name in _CONTROLLERS)
    try:
        (parent / "cgroup.subtree_control").write_text(wanted)
    except OSError as error:
        pytest.skip(f"{parent} does not delegate its controllers: {error}")


def _remove(directory: Path) -> None:
    """Remove a group and those below it; what still runs in them is a leak, and is killed."""
    if not directory.exists():
        return
    for child in directory.iterdir():
        if child.is_dir():
            _remove(child)
    deadline = time.monotonic() + _REMOVE_SECONDS
    while True:
        try:
            members = {int(pid) for pid in (directory / "cgroup.procs").read_text().split()}
            # A thread of ours that was moved here makes us a member until the kernel has
            # ended it, which is a little after join().
            for pid in members - {os.getpid()}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            directory.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            # The kernel frees a group only when its last process has been waited for.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return
