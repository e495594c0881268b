"""System calls that a filter refuses: a pool works without, or its error names the call."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import support_seccomp
from support_processes import run_script

from safepool.pool.shell import refused_calls

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's"),
    pytest.mark.skipif(not support_seccomp.can_refuse(), reason="unknown numbers of calls"),
]

TESTS = Path(__file__).parent.parent
WAYS = ("safepool", "loky", "spawn")

PROGRAM = """
import errno, os, selectors, sys, time
import support_seccomp
import safepool
from safepool.pool import executor
from safepool.workers import forkserver

way, call, error = sys.argv[1:]
if __name__ == "__main__":
    support_seccomp.refuse(call, error=getattr(errno, error))
    try:
        with safepool.ProcessPool(1, mp_context=way) as pool:
            assert [*pool.map(abs, [-1, -2])] == [1, 2]
            assert pool.submit(len, bytearray(2_000_000)).result() == 2_000_000
            try:
                pool.submit(safepool.worker(time.sleep, timeout=0.1), 60).result()
            except safepool.TaskTimeoutError:
                pass
            assert pool.submit(abs, -3).result() == 3
        print("works")
    except safepool.SafepoolError as error:
        cause = error if isinstance(error, safepool.RefusedCallError) else error.__cause__
        print(type(cause).__name__, f"{call}()" in str(error) and call in cause.filename)
"""
WORKS, NAMED = "works", "RefusedCallError True"


def outcome(way: str, call: str, error: str, folder: Path) -> str:
    script = folder / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(script), way, call, error],
        env={**os.environ, "PYTHONPATH": str(TESTS), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    # loky prints tracebacks of its own.
    return (done.stdout.splitlines() or [done.stderr])[-1]


# One row per kind of place where a call is made: in the program, its scheduler, the fork server,
# a worker; and what comes of it.
ROWS: dict[tuple[str, str, str], str] = {
    ("safepool", "socketpair", "EPERM"): NAMED,
    ("safepool", "sendto", "EPERM"): NAMED,
    ("safepool", "clone", "EPERM"): WORKS,
    ("safepool", "epoll_wait", "EPERM"): NAMED,
    ("safepool", "getsockname", "EPERM"): NAMED,
    ("loky", "sendmsg", "EPERM"): WORKS,
    ("loky", "recvmsg", "ENOSYS"): NAMED,
}


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_a_refused_call_is_named_or_not_needed(row: tuple[str, str, str], tmp_path: Path) -> None:
    assert outcome(*row, tmp_path) == ROWS[row]


# All that has to do with limits and pools, beside a pool itself.
FRONT_ENDS = """
import errno
from concurrent.futures import ThreadPoolExecutor
import joblib, support_seccomp
import safepool
from safepool.cli import main

if __name__ == "__main__":
    support_seccomp.refuse(*support_seccomp.OPTIONAL, error=errno.EPERM)
    with safepool.parallel_backend():
        print("joblib", joblib.Parallel(2)(joblib.delayed(abs)(x) for x in (-1, -2)))
    with ThreadPoolExecutor(1) as engine, safepool.ClusterPool(engine) as pool:
        print("ClusterPool", [*pool.map(abs, (-1, -2))])
    with safepool.Pool() as pool:
        print("Pool", pool.map(abs, (-1, -2)))
    print("limits", main(["limits"]) in (0, 1))
    print("doctor", main(["doctor", "json"]))
"""
ANSWERS = ["joblib [1, 2]", "ClusterPool [1, 2]", "Pool [1, 2]", "limits True", "doctor 0"]


def test_front_ends_work_where_calls_are_refused(tmp_path: Path) -> None:
    done = run_script(FRONT_ENDS, cwd=tmp_path)

    assert done.stderr == ""
    assert [line for line in done.stdout.splitlines() if line in ANSWERS] == ANSWERS


# Where Python's own import system fails, before there is a pool: loky is imported for it.
NOT_IMPORTED = {("loky", "getdents64")}


@pytest.mark.slow
@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", support_seccomp.NUMBERS)
def test_each_call_of_a_pool_is_named_or_not_needed(
    call: str, way: str, error: str, tmp_path: Path
) -> None:
    found = outcome(way, call, error, tmp_path)
    if (way, call) in NOT_IMPORTED:
        traced = found.startswith("Traceback") and "loky" in found.splitlines()[-1]
        assert traced or found == "ModuleNotFoundError False"
    else:
        assert found in {WORKS, NAMED}


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS, errno.EACCES])
def test_refused_calls_are_found_by_trying(error: int) -> None:
    """In a child each, which tells by its exit code alone: it may not be able to write."""
    assert refused_calls.refused_call() is None or os.environ.get("CI")
    import ctypes  # noqa: F401 -- a child may not be able to open a file

    column = refused_calls._COLUMNS[os.uname().machine]
    wrong = []
    for call in refused_calls._CALLS:
        if call[column] < 0:  # type: ignore[operator]
            continue
        with warnings.catch_warnings(action="ignore"):  # threads of the test's own runner
            pid = os.fork()
        if pid == 0:
            code = 1
            try:
                support_seccomp.refuse_number(call[column], error=error)  # type: ignore[arg-type]
                found = refused_calls.refused_call()
                expected = call.name != "clone3" or error != errno.ENOSYS
                named = found is not None and found.filename == f"{call.name}()"
                code = 0 if named == expected else 2
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        if status:
            wrong.append((call.name, status))
    assert wrong == []
