"""Under a memory limit: a call that does not fit fails alone, and the kernel takes no program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support_cgroups import control_group

from safepool import ProcessPool
from safepool.workers import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
LIMIT_BYTES = 512 << 20
SCORE = Path("/proc/self/oom_score_adj")

START = """
import sys, time
import numpy as np
import safepool
from safepool import MemoryLimitError, WorkerDiedError
def ones(mib):
    return np.ones(mib << 17)
def blob(mib):
    return b"x" * (mib << 20)
def floats(count):
    return [float(number) for number in range(count)]
def fail(mib):
    raise ValueError(ones(mib))
def small_arrays(count):
    return [np.ones(1000) for _ in range(count)]
def size(value):
    return len(value)
def hog():
    held = []
    while True:
        held.append(b"x" * (1 << 24))
def refused(future):
    error = future.exception(60)
    assert error is None or isinstance(error, (MemoryLimitError, WorkerDiedError)), error
    return type(error).__name__
def survives(pool):
    assert pool.submit(abs, -1).result(60) == 1
    print("survived")
"""

# One row per way to use up a group's memory: a program, and what it prints before it says that it
# has survived. None: whatever comes of each call, by the kernel's choice.
PROGRAMS: dict[str, tuple[str, str | None]] = {
    "a result": (
        """
    error = pool.submit(ones, 2000).exception(60)
    print(type(error).__name__, getattr(error, "oom", 0) != None)
""",
        None,
    ),
    "a result whose copy does not fit": (
        """
    error = pool.submit(ones, 300).exception(60)
    print(error.wanted_bytes >> 20, 100 < error.left_bytes >> 20 < 220, error.limit_bytes >> 20)
    print("300 MiB" in str(error) and error.source in str(error))
    assert "in _packed" in str(error.__cause__)
""",
        "300 True 512\nTrue",
    ),
    "a result that fits": (
        "\n    print(pool.submit(ones, 150).result(60).nbytes >> 20)",
        "150",
    ),
    "a result in one piece": ("\n    print(refused(pool.submit(blob, 200)))", None),
    "results that nobody has taken": (
        """
    futures = [pool.submit(ones, 40) for _ in range(30)]
    kinds = [refused(future) for future in futures]
    assert kinds.count("NoneType") >= 5 and "MemoryLimitError" in kinds, kinds
    del futures
    print(pool.submit(ones, 100).result(60).nbytes >> 20)
""",
        "100",
    ),
    "results in one piece that nobody has taken": (
        """
    futures = [pool.submit(blob, 20) for _ in range(40)]
    kinds = [refused(future) for future in futures]
    assert kinds.count("NoneType") >= 5, kinds
""",
        None,
    ),
    "lists that nobody has taken": (
        """
    futures = [pool.submit(floats, 1_000_000) for _ in range(25)]
    kinds = [refused(future) for future in futures]
    assert kinds.count("NoneType") >= 5, kinds
""",
        None,
    ),
    "exceptions that hold much": (
        """
    errors = [future.exception(60) for future in [pool.submit(fail, 30) for _ in range(20)]]
    assert {type(error) for error in errors} <= {ValueError, MemoryLimitError, WorkerDiedError}
""",
        None,
    ),
    "many small arrays that fit": (
        "\n    print(len(pool.submit(small_arrays, 10_000).result(60)))",
        "10000",
    ),
    "small results that nobody has taken": (
        """
    futures = [pool.submit(blob, 1) for _ in range(600)]
    kinds = [refused(future) for future in futures]
    assert kinds.count("NoneType") >= 200 and "MemoryLimitError" in kinds
""",
        None,
    ),
    "a map whose reader comes late": (
        """
    results = pool.map(ones, [20] * 40)
    time.sleep(1)
    print(sum(int(array[0]) for array in results))
""",
        "40",
    ),
    "an argument": (
        """
    array = ones(300)
    future, small = pool.submit(size, array), pool.submit(size, array[:1000])
    error = future.exception(60)
    print(error.wanted_bytes >> 20, error.__traceback__, small.result(60))
    print(type(next(pool.map(size, [array[:1 << 19]]))).__name__)
    try:
        next(pool.map(size, [array]))
    except MemoryLimitError:
        print("refused")
""",
        "300 None 1000\nint\nrefused",
    ),
    "an argument in one piece": (
        """
    data = bytes(300 << 20)
    print(refused(pool.submit(size, data)), pool.submit(size, data[:10]).result(60))
    print(refused(pool.submit(sorted, [], key=data)))
    try:
        list(pool.map(size, [data, b"x"]))
    except MemoryLimitError:
        print("refused")
""",
        "MemoryLimitError 10\nMemoryLimitError\nrefused",
    ),
    "a shared array": (
        """
    array = ones(300)
    try:
        safepool.share(array)
    except MemoryLimitError as error:
        print(error.wanted_bytes >> 20)
    print(pool.submit(size, safepool.share(array[:1000])).result(60))
""",
        "300\n1000",
    ),
    "a global": (
        """
    table = ones(300)
    print(refused(pool.submit(lambda: table.sum())))
    try:
        next(pool.map(lambda _: table.sum(), [1]))
    except MemoryLimitError:
        print("refused")
""",
        "MemoryLimitError\nrefused",
    ),
    "joblib": (
        """
    from joblib import Parallel, delayed
    array, data = ones(200), bytes(300 << 20)
    def told(function, *arguments):
        try:
            print(len(Parallel(n_jobs=2)(delayed(function)(*arguments) for _ in range(2))))
        except (MemoryLimitError, WorkerDiedError) as error:
            print("refused")
    with safepool.parallel_backend():
        told(ones, 10)
        told(ones, 400)
        told(size, array[:1000])
        told(size, data)
        del array
        array = ones(300)
        told(size, array)
""",
        "2\nrefused\n2\nrefused\nrefused",
    ),
    "a program that holds most of it itself": (
        """
    array = ones(320)
    error = pool.submit(hog).exception(60)
    print(type(error).__name__, error.oom is not None)
""",
        "WorkerDiedError True",
    ),
    "page cache is no reason to refuse": (
        """
    import os
    with open(sys.argv[1], "wb") as file:
        for _ in range(600):
            file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())
    print(pool.submit(ones, 150).result(60).nbytes >> 20)
""",
        "150",
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_program_survives(program: str, tmp_path: Path) -> None:
    code, expected = PROGRAMS[program]
    code = f"{START}\nwith safepool.ProcessPool(2) as pool:{code}\n    survives(pool)\n"
    with control_group(memory_bytes=LIMIT_BYTES) as group:
        printed = group.run(code, str(tmp_path / "file"), timeout_s=110)

    assert printed.endswith("survived")
    if expected is not None:
        assert printed == f"{expected}\nsurvived"


def test_an_initializer_that_does_not_fit_breaks_the_pool_alone() -> None:
    code = """
array = ones(300)
with safepool.ProcessPool(2, initializer=size, initargs=(array,)) as pool:
    error = pool.submit(abs, -1).exception(60)
    print(type(error).__name__, type(error.__cause__).__name__)
"""
    with control_group(memory_bytes=LIMIT_BYTES) as group:
        assert group.run(START + code, timeout_s=110) == "PoolBrokenError MemoryLimitError"


def scores(_: object) -> tuple[int, int]:
    """Return this worker's and that of what a task starts."""
    child = subprocess.run(["cat", SCORE], capture_output=True, text=True, check=True)
    return int(SCORE.read_text()), int(child.stdout)


@pytest.mark.parametrize("method", [None, "loky", "spawn", "forkserver", "fork"])
@pytest.mark.filterwarnings("ignore:.*fork")
def test_the_kernel_takes_a_worker_first(method: str | None) -> None:
    """And what a task has started; the program's own number stays."""
    before = int(SCORE.read_text())
    expected = min(1000, before + 1000)
    with ProcessPool(1, method) as pool:
        assert pool.submit(scores, 0).result(timeout=60) == (expected, expected)
    assert int(SCORE.read_text()) == before


# One row per number of the program: what its workers have.
SCORES = {-997: 3, -500: 500, 0: 1000, 300: 1000, 1000: 1000}


@pytest.mark.parametrize("score", SCORES)
def test_a_workers_number_is_relative_to_the_programs(
    score: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the machine's root may lower its own, so the file is not the kernel's here."""
    file = tmp_path / "oom_score_adj"
    file.write_text(f"{score}\n")
    monkeypatch.setattr(main, "_OOM_SCORE", str(file))
    main._be_taken_first()

    assert int(file.read_text()) == SCORES[score]


def test_where_the_number_cannot_be_written_a_pool_works(tmp_path: Path) -> None:
    """A sandbox without the file, or with one that is read-only."""
    code = """
import sys, safepool
from safepool.workers import main
for name in ("/no/such/file", "/proc/self/status", sys.argv[1]):
    main._OOM_SCORE = name
    with safepool.ProcessPool(1, "fork") as pool:
        print(pool.submit(abs, -1).result())
"""
    nothing = tmp_path / "empty"
    nothing.touch()
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(nothing)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ended.stdout.split() == ["1", "1", "1"]
