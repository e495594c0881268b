"""A Python that was built with the C headers of an old system: everything works there."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import safepool

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names of Linux")

PACKAGE = Path(safepool.__file__).parent

# What `safepool.linux` answers for: each may be missing in a Python.
NAMES = [
    "fcntl.F_ADD_SEALS",
    "fcntl.F_DUPFD_CLOEXEC",
    "fcntl.F_GET_SEALS",
    "fcntl.F_SEAL_GROW",
    "fcntl.F_SEAL_SEAL",
    "fcntl.F_SEAL_SHRINK",
    "fcntl.F_SEAL_WRITE",
    "fcntl.F_SETSIG",
    "os.MFD_ALLOW_SEALING",
    "os.MFD_CLOEXEC",
    "os.memfd_create",
    "os.pidfd_open",
    "os.preadv",
    "select.POLLRDHUP",
    "signal.pidfd_send_signal",
    "socket.MSG_CMSG_CLOEXEC",
]

# Imported by every Python of the program, before anything of ours.
WITHOUT = """
import importlib, os
for name in os.environ["TEST_WITHOUT"].split():
    module, attribute = name.split(".")
    vars(importlib.import_module(module)).pop(attribute, None)
"""

# Large buffers in both directions, a task that is ended; spawn, if it is asked for.
PROGRAM = """
import pathlib, pickle, sys, time
import safepool

def negated(buffer):
    assert "memfd:safepool-arrays" in pathlib.Path("/proc/self/maps").read_text()
    return pickle.PickleBuffer(bytearray(255 - byte for byte in memoryview(buffer)))

if __name__ == "__main__":
    buffer = pickle.PickleBuffer(bytearray(range(256)) * 8192)
    for method in [None, *sys.argv[1:]]:
        with safepool.ProcessPool(2, mp_context=method) as pool:
            got = bytes(pool.submit(negated, buffer).result(60))
            assert got == bytes(range(255, -1, -1)) * 8192, got[:9]
            running = pool.submit(time.sleep, 600)
            while not running.running():
                time.sleep(0.01)
            assert pool.cancel(running, kill=True)
            assert list(pool.map(abs, range(-3, 0))) == [3, 2, 1]
    print("done")
"""


# None, each by itself, all. A constant by itself is left to the long run: its number is compared
# with Python's own below, and with all of them away none is used.
WITHOUTS = [
    pytest.param([], id="nothing"),
    *(
        pytest.param([name], id=name, marks=[pytest.mark.slow] * name.split(".")[1].isupper())
        for name in NAMES
    ),
    pytest.param(NAMES, id="all"),
]


@pytest.mark.parametrize("without", WITHOUTS)
def test_a_pool_needs_none_of_the_names(without: list[str], tmp_path: Path) -> None:
    """Neither in the program nor in its workers, and buffers go through files all the same."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "program.py", *(["spawn"] if len(without) != 1 else [])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "TEST_WITHOUT": " ".join(without)},
        check=False,
    )

    assert (done.stdout, done.stderr) == ("done\n", "")


def test_numbers_are_those_of_this_python() -> None:
    """Where it has them: a number that is written down differs in nothing."""
    code = "import safepool.linux as l; print([+getattr(l, n) for n in dir(l) if n[1:].isupper()])"
    found = []
    for without in ("", " ".join(NAMES)):
        environ = {**os.environ, "TEST_WITHOUT": without}
        command = [sys.executable, "-c", WITHOUT + code]
        found.append(subprocess.check_output(command, text=True, env=environ, timeout=60))

    assert found[0] == found[1]


def test_a_call_that_fails_says_why() -> None:
    """The stand-ins raise what the names that they stand for raise."""
    from safepool import linux

    reached = linux._pidfd_open(os.getpid())
    try:
        assert not os.get_inheritable(reached)
        linux._pidfd_send_signal(reached, 0)
        with pytest.raises(OSError, match="Invalid argument"):
            linux._pidfd_send_signal(reached, 12345)
    finally:
        os.close(reached)
    with pytest.raises(OSError, match="Invalid argument"):
        linux._memfd_create("name", 1 << 20)
    with pytest.raises(OSError, match="Function not implemented"):
        linux._call("no_such_function_of_the_c_library")


def test_the_names_are_taken_from_one_place() -> None:
    """A name that may be missing is read in ``linux.py`` alone."""
    found = {name: modules - {"linux.py"} for name, modules in _names_used() if name in NAMES}

    assert {name: modules for name, modules in found.items() if modules} == {}


def test_this_python_has_every_other_name_that_the_package_uses() -> None:
    """Fails on a build that lacks a name for which ``linux.py`` does not answer yet."""
    missing = {
        name
        for name, modules in _names_used()
        if not hasattr(importlib.import_module(name.split(".")[0]), name.split(".")[1])
        and modules != {"linux.py"}
    }

    # Set for a worker's programs, where the standard library has it (3.13).
    assert missing <= {"os.process_cpu_count"}


def _names_used() -> Iterator[tuple[str, set[str]]]:
    """Yield each attribute of a module of the system that the package reads, and where."""
    used: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(value=ast.Name(id=module), attr=name) if module in MODULES:
                    used.setdefault(f"{module}.{name}", set()).add(path.name)
    yield from used.items()


MODULES = {"errno", "fcntl", "mmap", "os", "resource", "select", "signal", "socket"}
