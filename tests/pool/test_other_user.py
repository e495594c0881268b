"""Another user of the machine reaches nothing of a program's pools, and reads no secret."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safepool.cluster import agent

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root becomes another user, on Linux"
)

TESTS = Path(__file__).parents[1]
ANOTHER = 65534
SECRET = "hunter2-5e8a"
KEY = "SAFEPOOL_TEST_PROGRAM"

# Whatever a pool can hold, at the same time, and all that is given to it has the secret in it.
PROGRAM = """
import multiprocessing, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
import numpy as np
import safepool
from safepool.cluster import ClusterPool

def begin(text):
    global given
    given = text

def work(text, array, gate):
    import numpy
    while not os.path.exists(gate):
        time.sleep(0.01)
    return text + str(int(array[0]))

if __name__ == "__main__":
    SECRET = sys.stdin.readline().strip()
    multiprocessing.current_process().authkey = SECRET.encode()
    gate, trace, *methods = sys.argv[1:]
    large = np.zeros(1 << 19)
    futures = []
    with ExitStack() as stack:
        for method in methods:
            pool = stack.enter_context(safepool.ProcessPool(
                1, mp_context=None if method == "default" else method, initializer=begin,
                initargs=(SECRET,), env={"PASSWORD": SECRET}, end_subprocesses=method == "default",
                trace=trace if method == "default" else None))
            shared = safepool.share(np.zeros(1 << 19))
            futures.append([pool.submit(work, SECRET, array, gate) for array in (large, shared)])
        engine = stack.enter_context(ThreadPoolExecutor(1))
        cluster = stack.enter_context(ClusterPool(engine))
        futures.append([cluster.submit(work, SECRET, large, gate)])
        while not all(any(future.running() for future in pool) for pool in futures):
            time.sleep(0.01)
        print("ready", flush=True)
        sys.stdin.readline()
        open(gate, "w").close()
        print({future.result() for pool in futures for future in pool} == {SECRET + "0"})
"""


@contextlib.contextmanager
def folder_for_everybody() -> Iterator[Path]:
    """Make a folder like /tmp, whatever those of this run are."""
    made = tempfile.mkdtemp(prefix="safepool-", dir="/tmp")
    os.chmod(made, 0o1777)
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made)


def family(key: str) -> list[int]:
    """Return the processes that were born with that in their environment."""
    found = []
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            if key.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def sockets_of(processes: list[int]) -> set[str]:
    """Return the inodes of the sockets that they hold."""
    found = set()
    for pid in processes:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.update(re.findall(r"^socket:\[(\d+)\]$", os.readlink(entry)))
    return found


def addresses(inodes: set[str]) -> tuple[list[str], list[str]]:
    """Return type and name of their Unix sockets, and the sockets of a network with open ports."""
    found, listening = [], []
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, _, _, kind, _, inode, *name = line.split(maxsplit=7)
        if inode in inodes:
            found += [f"{int(kind)} {one}" for one in name]
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            _, local, _, state, _, _, _, _, _, inode, *_ = line.split()
            if inode in inodes and (state == "0A" or kind.startswith("udp")):
                listening.append(f"{kind} {local}")
    return found, listening


def names_below(*folders: Path) -> set[str]:
    return {str(path) for folder in folders for path in folder.rglob("*")}


def reached(**what: list[str] | list[int]) -> list[str]:
    """Return what another user reaches of it."""
    ran = subprocess.run(
        [sys.executable, str(TESTS / "support_other_user.py"), str(ANOTHER)],
        input=json.dumps(what), capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: list[str] = json.loads(ran.stdout)
    return found


# A fork first, as long as the program has no threads.
METHODS = ("fork", "default", "loky", "spawn", "forkserver")


@pytest.mark.timeout(300)  # a dozen interpreters start: minutes where all CPUs are taken
def test_another_user_reaches_nothing_of_a_program_that_uses_all(tmp_path: Path) -> None:
    """No socket, file, memory or process; and no command line has a secret."""
    key = f"{KEY}={os.getpid()}"
    (tmp_path / "program.py").write_text(PROGRAM)
    with folder_for_everybody() as folder:
        # The trace is a file that the user has named, and has a umask for.
        command = [sys.executable, "program.py", str(folder / "gate"), str(tmp_path / "trace")]
        environment = {
            **os.environ,
            "PYTHONPATH": str(TESTS.parent),
            "TMPDIR": str(folder),
            "OPENBLAS_NUM_THREADS": "1",  # else its threads are there when the fork is made
            KEY: key.partition("=")[2],
        }
        before = names_below(Path("/dev/shm"), folder)
        memory = Path("/proc/sysvipc/shm").read_text()
        with subprocess.Popen(
            [*command, *METHODS], cwd=tmp_path, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as program:  # fmt: skip
            assert program.stdin is not None
            assert program.stdout is not None
            try:
                print(SECRET, file=program.stdin, flush=True)
                assert program.stdout.readline() == "ready\n"
                processes = family(key)
                # A worker for each pool, a server or more, trackers, a keeper.
                assert len(processes) > len(METHODS) + 4
                lines = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes)
                made = names_below(Path("/dev/shm"), folder) - before
                found, listening = addresses(sockets_of(processes))
                assert reached(processes=processes, names=sorted(made), sockets=found) == []
                assert listening == []
                # A name that one agent of the machine holds, and another session may hold it.
                abstract = {one.rstrip("0123456789abcdef") for one in found if "@" in one}
                assert abstract <= {"1 @safepool-agent-"}
                assert SECRET.encode() not in lines
                assert Path("/proc/sysvipc/shm").read_text() == memory
                print(file=program.stdin, flush=True)
                assert program.stdout.read() == "True\n"
            finally:
                program.kill()


def test_another_user_reaches_what_is_open_to_everybody() -> None:
    """So that the test before can fail."""
    with (
        folder_for_everybody() as folder,
        socket.socket(socket.AF_UNIX) as listener,
        subprocess.Popen(["sleep", "60"], user=ANOTHER, group=ANOTHER) as other,
    ):
        try:
            (folder / "file").touch(0o644)
            listener.bind(f"\0{folder}")
            listener.listen()
            name = f"1 @{folder}"
            assert addresses({str(os.fstat(listener.fileno()).st_ino)}) == ([name], [])
            found = reached(
                processes=[os.getpid(), other.pid], names=[str(folder / "file")], sockets=[name]
            )
        finally:
            other.kill()

    assert {f"/proc/{other.pid}/environ", f"/proc/{other.pid}/fd", f"kill {other.pid}"} < {*found}
    assert found[-2:] == [str(folder / "file"), name]
    assert not any(str(os.getpid()) in one for one in found)


HOLDER = """
import socket, sys
import support_other_user
with socket.socket(socket.AF_UNIX) as holder:
    support_other_user.be(int(sys.argv[1]))
    holder.bind("\\0" + sys.argv[2])
    print("bound", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("user", [0, ANOTHER])
def test_the_name_of_an_agent_is_held_by_this_user_alone(user: int) -> None:
    """Whoever else takes it keeps no node from a cluster pool."""
    name = f"safepool-test-{os.getpid()}-{user}"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(user), name],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == "bound\n"
        with pytest.raises(OSError, match="in use") if user == 0 else contextlib.nullcontext():
            assert agent._bound(name) is None
        holder.communicate()

    free = agent._bound(name)
    assert free is not None
    free.close()
