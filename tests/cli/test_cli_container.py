"""``ENTRYPOINT ["safepool", "run", "--"]``, in real containers with a real quota.

A container here has its own processes, mounts, control groups and root folder, which holds the
machine's own system and this Python. ``runc`` makes it where it is installed, and ``unshare`` and
``pivot_root`` wherever that is allowed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import support_cgroups
import support_containers

import safepool

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="root makes containers, on Linux"
)

PACKAGE = Path(safepool.__file__).parent
ENTRYPOINT = [sys.executable, "-m", "safepool", "run", "--"]
ENVIRON = {
    "PATH": os.environ.get("PATH", os.defpath),
    "PYTHONPATH": str(PACKAGE.parent),
    "MAX_JOBS": "7",
}
# The machine's other folders are the container's as well, and what runs here wherever it is.
OWN = {"proc", "sys", "dev", "run", "tmp"}
NEEDED = {Path(sys.prefix), Path(sys.base_prefix), PACKAGE}
SHARED = [
    *(str(path) for path in sorted(Path("/").iterdir()) if path.is_dir() and path.name not in OWN),
    *(str(path) for path in sorted(NEEDED) if path.parts[1] in OWN),
]


@contextlib.contextmanager
def by_unshare(folder: Path, command: Sequence[str]) -> Iterator[list[str]]:
    root = folder / "root"
    lines = [
        f"mount -t tmpfs tmpfs {root}",
        *(f"mkdir -p {root}{path} && mount --bind {path} {root}{path}" for path in SHARED),
        f"cd {root} && mkdir -p {' '.join(sorted(OWN))} old",
        "mount -t proc proc proc && mount --rbind /dev dev && mount -t sysfs sysfs sys",
    ]
    with support_cgroups.control_group(cpus=1) as group:
        if group.version == 2:
            lines.append("mount -t cgroup2 cgroup2 sys/fs/cgroup")
        else:
            lines.append("mount -t tmpfs tmpfs sys/fs/cgroup && mkdir sys/fs/cgroup/cpu")
            lines.append("mount -t cgroup -o cpu cgroup sys/fs/cgroup/cpu")
        lines.append("pivot_root . old && cd / && umount -l /old")
        environ = [f"{name}={value}" for name, value in ENVIRON.items()]
        lines.append(f"exec env -i {shlex.join([*environ, *command])}")
        root.mkdir()
        unshare = ["unshare", "--fork", "--pid", "--kill-child", "--mount", "--uts", "--ipc"]
        yield group.command([*unshare, "--cgroup", "sh", "-ec", "\n".join(lines)])


def by_runc(folder: Path, command: Sequence[str]) -> AbstractContextManager[list[str]]:
    settings = support_containers.Settings(cpus=1, environ=ENVIRON)
    return support_containers.container("runc", folder, command, settings)


ENGINES = {"unshare": by_unshare, "runc": by_runc}


@contextlib.contextmanager
def container(engine: str, folder: Path, script: str) -> Iterator[subprocess.Popen[str]]:
    """Start a shell's script by the entry point; skip the test where no container can be made."""
    if shutil.which(engine) is None:
        pytest.skip(f"{engine} is not installed")
    for number, command in enumerate((["true"], [*ENTRYPOINT, "sh", "-c", script])):
        below = folder / str(number)
        below.mkdir()
        with ENGINES[engine](below, command) as words:
            if not number:
                tried = subprocess.run(words, capture_output=True, text=True, check=False)
                if tried.returncode:
                    pytest.skip(f"no container can be made here: {tried.stderr.strip()}")
                continue
            with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as started:
                try:
                    yield started
                finally:
                    started.kill()


SCRIPT = """
trap 'exit 41' TERM
echo $$ $PYTHON_CPU_COUNT $OMP_NUM_THREADS $GOMAXPROCS $MAX_JOBS
sleep 100 & wait
"""


def first_process(started: subprocess.Popen[str], folder: Path) -> int:
    """Return the process that is the first one of its container."""
    told = folder / "1" / "pid"
    if not told.exists():
        told = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    return int(told.read_text())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_entry_point_becomes_the_program(engine: str, tmp_path: Path) -> None:
    """The first process of the container, with its limit; signals and exit codes are its own."""
    with container(engine, tmp_path, SCRIPT) as started:
        assert started.stdout is not None
        said = started.stdout.readline().split()
        assert said == ["1", "1", "1", "1", "7"]
        os.kill(first_process(started, tmp_path), signal.SIGTERM)
        code = started.wait(timeout=60)

    assert code == 41
