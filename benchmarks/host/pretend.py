"""A child process that believes in more CPUs than there are, as on a large host.

In a container on a host of 48 CPUs, ``os.cpu_count()``, OpenBLAS and OpenMP see 48, whatever the
quota is. No variable brings that about on a smaller machine: OpenBLAS starts no more threads than
it sees CPUs. So ``manycore.c`` answers in the place of the C library, compiled on the spot and
preloaded (ld.so(8), ``LD_PRELOAD``) into the children alone. It hides the affinity mask, which is
the host's there; a quota is what holds such a container, and is real here too.

Not covered:
    * Systems without a C compiler, or other than Linux: refused, with what is missing.
    * Libraries that read CPUID, ``/proc/cpuinfo`` or ``/sys``: they see this machine.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safepool.cli.text import CommandError
from safepool.limits import Limit
from safepool.limits.affinity import AFFINITY

if TYPE_CHECKING:
    from safepool.limits import Limits

__all__ = ["PretendError", "build", "check_room", "environment", "seen_from_inside"]

_SOURCE = Path(__file__).with_name("manycore.c")
_COMPILERS = ("cc", "gcc", "clang")
_BUILD_WITHIN_S = 60.0

# What both ways to ask answer: some libraries take one, some the other.
_ASK = "import os; print(os.sysconf('SC_NPROCESSORS_ONLN'), len(os.sched_getaffinity(0)))"

# A worker of the standard pool with NumPy, SciPy and 48 threads holds 13 MB that it shares with
# no other one, at 150 points; a task has about ten matrices at once.
_WORKER_BYTES = 16 << 20
_MATRICES = 10
# NumPy and SciPy bring one each, compiled for at most so many threads.
_OPENBLAS_COPIES = 2
_OPENBLAS_MOST = 64


class PretendError(CommandError):
    """A larger machine cannot be pretended here."""

    def __str__(self) -> str:
        return f"--pretend-host-cpus: {self.reason}"


def environment(cpus: int, folder: Path) -> dict[str, str]:
    """Return the variables with which a child believes in so many CPUs.

    Args:
        cpus: Number of CPUs to pretend, at most 128.
        folder: Where to compile what answers in the C library's place. It is needed as long as
            the children run.

    Raises:
        PretendError: The library cannot be compiled, or a Python that is started with it sees
            something else.
    """
    library = build(folder)
    loaded = [str(library), *filter(None, [os.environ.get("LD_PRELOAD")])]
    variables = {"LD_PRELOAD": ":".join(loaded), "FAKE_NCPU": str(cpus)}
    asked = subprocess.run(
        [sys.executable, "-I", "-c", _ASK],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=_BUILD_WITHIN_S,
        check=False,
    )
    # The loader goes on without a library that it cannot load, such as from a noexec folder.
    if asked.stdout.split() != [str(cpus)] * 2:
        said = (asked.stderr.strip() or asked.stdout.strip() or "nothing").splitlines()[0]
        raise PretendError(f"{sys.executable} with {library} does not report {cpus} CPUs: {said}")
    return variables


def build(folder: Path) -> Path:
    """Compile the library into a folder.

    Raises:
        PretendError: Not on Linux, no compiler, or it failed.
    """
    if platform.system() != "Linux":
        raise PretendError("only Linux preloads a library into a child")
    compiler = (
        shlex.split(os.environ.get("CC", ""))
        or [found for name in _COMPILERS if (found := shutil.which(name))][:1]
    )
    if not compiler:
        raise PretendError(
            "needs a C compiler, and there is no cc, gcc or clang here. "
            "Install one, such as with: apt-get install gcc libc6-dev"
        )
    library = folder / "manycore.so"
    command = [*compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(_SOURCE), "-ldl"]
    try:
        built = subprocess.run(
            command, capture_output=True, text=True, timeout=_BUILD_WITHIN_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PretendError(f"{compiler[0]} does not run: {error}") from error
    if built.returncode != 0:
        errors = [line for line in built.stderr.splitlines() if "error" in line]
        said = (errors or built.stderr.splitlines() or ["it says nothing"])[0]
        raise PretendError(f"{compiler[0]} cannot compile {_SOURCE}: {said}")
    return library


def seen_from_inside(limits: Limits, cpus: int) -> Limits:
    """Return the limits that a child reads which believes in so many CPUs.

    Args:
        limits: The limits that are read here.
        cpus: Number of CPUs that the child sees.

    Raises:
        PretendError: No quota holds it to the CPUs that there are. On a large host without one
            all CPUs could be used, so safepool would start as many workers, too.
    """
    real = limits.affinity.cpus or 1.0
    if min((quota.cpus for quota in limits.quotas if quota.cpus), default=real + 1) > real:
        raise PretendError(
            f"needs a quota of at most the {real:g} CPUs of this process. Run it in a container "
            "with a quota, or as root with --cpus"
        )
    affinity = Limit(name=AFFINITY, cpus=float(cpus), source="--pretend-host-cpus", raw=str(cpus))
    return replace(limits, affinity=affinity)


def check_room(limits: Limits, cpus: int, points: int, *, proc: Path = Path("/proc")) -> None:
    """See that the machine holds the standard pool's workers and threads.

    A group's ceiling on threads is no reason: what happens there then is what is to be seen.

    Args:
        limits: The limits that are read here.
        cpus: Number of workers that it will start.
        points: Size of a task.
        proc: The files that say how much memory is left (proc_meminfo(5)), and how many threads
            the whole machine may have (proc_sys_kernel(5)).

    Raises:
        PretendError: There is no room: another process would be killed, or could not start.
    """
    threads = cpus * _OPENBLAS_COPIES * min(cpus, _OPENBLAS_MOST)
    for name in ("pid_max", "threads-max"):
        file = proc / "sys" / "kernel" / name
        if threads > (most := int(file.read_text())) // 2:
            raise PretendError(
                f"{cpus} workers have about {threads} threads, and {file} has {most} for the "
                "whole machine. Take fewer CPUs"
            )
    meminfo = str(proc / "meminfo")
    needed = cpus * (_WORKER_BYTES + _MATRICES * 8 * points**2)
    rooms = [
        (memory.bytes - (memory.used_bytes or 0) + (memory.reclaimable_bytes or 0), memory.source)
        for memory in limits.memory
        if memory.bytes is not None
    ]
    fields = (line.split() for line in Path(meminfo).read_text().splitlines())
    rooms += [(int(f[1]) << 10, meminfo) for f in fields if f[0] == "MemAvailable:"]
    left, source = min(rooms, default=(needed, meminfo))
    if left < needed:
        raise PretendError(
            f"{cpus} workers need about {needed >> 20} MiB, and {source} leaves "
            f"{max(0, left) >> 20}. Take fewer CPUs or fewer --points"
        )
