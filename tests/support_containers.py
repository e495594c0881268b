"""OCI containers for tests, made by ``runc`` or ``crun``: this Python in a system of its own.

    with container("runc", folder, ["python", "/app/program.py"], cpus=1) as command:
        subprocess.run(command)

The root folder is empty. What is mounted into it: the machine's programs and libraries, this
Python, the package, and ``folder / "app"`` as ``/app``, all of them read-only.

Source: the OCI runtime specification, config.md and config-linux.md.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import support_cgroups

import safepool

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ENGINES = ("runc", "crun")
PERIOD_US = 100_000
PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What differs from the container of root that ``runc spec`` describes.

    Attributes:
        cpus: CPU quota; ``None`` sets none.
        memory_bytes: Ceiling on memory.
        tasks: Ceiling on processes and threads.
        read_only: No file of the root folder can be written.
        shared_memory: Whether ``/dev/shm`` is there.
        temporary: Whether ``/tmp`` can be written, whatever the root folder.
        user: Number of the user and the group; no other file says anything of it.
        capabilities: Whether it has those that ``runc spec`` gives.
        refused: System calls that a filter refuses.
        refused_family: An address family that ``socket()`` and ``socketpair()`` refuse.
        environ: Environment.
    """

    cpus: float | None = 2
    memory_bytes: int | None = None
    tasks: int | None = None
    read_only: bool = False
    shared_memory: bool = True
    temporary: bool = False
    user: int = 0
    capabilities: bool = True
    refused: tuple[str, ...] = ()
    refused_family: int | None = None
    environ: dict[str, str] = field(default_factory=dict)

    def write(self, spec: dict[str, Any]) -> None:
        """Change what ``runc spec`` has made."""
        process, linux = spec["process"], spec["linux"]
        process["user"] = {"uid": self.user, "gid": self.user}
        spec["root"]["readonly"] = self.read_only
        if not self.capabilities:
            process["capabilities"] = {kind: [] for kind in process["capabilities"]}
        if not self.shared_memory:
            spec["mounts"] = [one for one in spec["mounts"] if one["destination"] != "/dev/shm"]
        if self.temporary:
            spec["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})
        resources: dict[str, Any] = {}
        if self.cpus is not None:
            resources["cpu"] = {"quota": round(self.cpus * PERIOD_US), "period": PERIOD_US}
        if self.memory_bytes is not None:
            resources["memory"] = {"limit": self.memory_bytes}
        if self.tasks is not None:
            resources["pids"] = {"limit": self.tasks}
        linux["resources"] = resources
        rules: list[dict[str, Any]] = [{"names": [name]} for name in self.refused]
        if self.refused_family is not None:
            family = {"index": 0, "value": self.refused_family, "op": "SCMP_CMP_EQ"}
            rules.append({"names": ["socket", "socketpair"], "args": [family]})
        if rules:
            refuse = {"action": "SCMP_ACT_ERRNO", "errnoRet": 1}  # EPERM
            linux["seccomp"] = {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{**refuse, **rule} for rule in rules],
            }


def shared_folders() -> list[str]:
    """Return the machine's folders that a container has as well."""
    own = {Path(safepool.__file__).parents[1], Path(__file__).parent}
    python = {Path(sys.prefix), Path(sys.base_prefix), *map(Path, sys.path)}
    program = Path(sys.executable)
    while program.is_symlink():  # an environment's program is a link, perhaps to a link
        program = program.parent / program.readlink()
        python.add(program.parent)
    found = sorted(path for path in {*own, *python} if path.is_dir())
    inner = [path for path in found if not any(path.is_relative_to(one) for one in PROGRAMS)]
    outer = [one for one in inner if not any(other in one.parents for other in inner)]
    return [*filter(os.path.isdir, PROGRAMS), *map(str, outer)]


@contextlib.contextmanager
def container(
    engine: str, folder: Path, command: Sequence[str], settings: Settings
) -> Iterator[list[str]]:
    """Describe a container, and give the command that runs it.

    Args:
        engine: Of :data:`ENGINES`.
        folder: Where it is described; ``app`` in it is its ``/app``.
        command: What its first process runs.
        settings: Its limits and what it lacks.
    """
    (folder / "rootfs").mkdir(parents=True)
    (folder / "app").mkdir(exist_ok=True)
    subprocess.run([engine, "spec"], cwd=folder, check=True)
    file = folder / "config.json"
    spec = json.loads(file.read_text())
    environ = {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONDONTWRITEBYTECODE": "1",
        **settings.environ,
    }
    spec["process"] |= {"terminal": False, "args": [*command], "cwd": "/"}
    spec["process"]["env"] = [f"{name}={value}" for name, value in environ.items()]
    settings.write(spec)
    places = {"/app": str(folder / "app"), **{path: path for path in shared_folders()}}
    spec["mounts"] += [
        {"destination": there, "source": here, "type": "bind", "options": ["rbind", "ro"]}
        for there, here in places.items()
    ]
    file.write_text(json.dumps(spec))
    words = [engine, "--root", str(folder / "state")]
    name = f"{support_cgroups.PREFIX}{os.getpid()}-{folder.name}"
    try:
        yield [*words, "run", "--pid-file", str(folder / "pid"), "--bundle", str(folder), name]
    finally:
        subprocess.run([*words, "delete", "--force", name], capture_output=True, check=False)


@functools.cache
def find_engine() -> str:
    """Return the first program that can make a container here; skip the test if none can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("root makes containers, on Linux")
    problems = []
    for engine in ENGINES:
        problem = why_not(engine)
        if problem is None:
            return engine
        problems.append(f"{engine}: {problem}")
    pytest.skip(f"no container can be made here: {'; '.join(problems)}")


def why_not(engine: str) -> str | None:
    """Say why that program makes no container here; ``None`` if it does."""
    if shutil.which(engine) is None:
        return f"{engine} is not installed"
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(cpus=1)
        with container(engine, Path(folder, "try"), ["/bin/true"], settings) as words:
            tried = subprocess.run(words, capture_output=True, text=True, check=False)
    return tried.stderr.strip() if tried.returncode else None
