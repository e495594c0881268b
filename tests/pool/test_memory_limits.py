"""Under a memory limit: a call that does not fit fails alone, and the kernel takes no program."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support_cgroups import control_group

from safepool import ProcessPool
from safepool.workers import main

if sys.platform == "linux":
    from safepool.workers import forkserver

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
    assert "a copy of 300 MiB" in str(error.__cause__)
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
    # Of these floats free-threaded builds make twice as much.
    assert kinds.count("NoneType") >= 3, kinds
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


# What bytes(n) takes is written there at once, and kept for other bytes when it is freed: the
# program's own data is then what does not fit.
with_gil = pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="free-threaded builds keep what is freed",
)

# Left to the long run: the rows beside them use up the same memory in a harder way.
SLOW = {"a result", "a result in one piece", "results in one piece that nobody has taken"}


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(
            one, marks=[pytest.mark.slow] * (one in SLOW) + [with_gil] * (one == "joblib")
        )
        for one in PROGRAMS
    ],
)
def test_the_program_survives(program: str, tmp_path: Path) -> None:
    code, expected = PROGRAMS[program]
    code = f"{START}\nwith safepool.ProcessPool(2) as pool:{code}\n    survives(pool)\n"
    with control_group(memory_bytes=LIMIT_BYTES) as group:
        printed = group.run(code, str(tmp_path / "file"), timeout_s=110)

    assert printed.endswith("survived")
    if expected is not None:
        assert printed == f"{expected}\nsurvived"


SHAPES = """
import dataclasses, itertools, os
@dataclasses.dataclass
class Holder:
    data: object
class Thing:
    def __init__(self, number):
        self.number, self.text, self.parts = number, str(number), [number]
M = 1 << 20
# Each takes some 50 MiB, of the 70 that are left, and its pickle does not fit beside it.
MAKERS = {
    "bytes": lambda: bytes(50 * M),
    "bytearray": lambda: bytearray(50 * M),
    "text": lambda: "x" * (50 * M),
    "wide text": lambda: chr(0x20AC) * (25 * M),
    "text in a dict": lambda: {"text": chr(0x20AC) * (25 * M)},
    "bytes in a list": lambda: [os.urandom(M) for _ in range(50)],
    "large bytes in a dict": lambda: {name: bytes(10 * M) for name in "abcde"},
    "bytes in dataclasses": lambda: Holder(Holder([bytes(50 * M)])),
    "small bytes": lambda: [os.urandom(8000) for _ in range(6000)],
    "nested arrays": lambda: {"a": [np.ones(M // 8) for _ in range(50)]},
    "small arrays": lambda: [np.ones(100) for _ in range(40_000)],
    "floats": lambda: [float(number) for number in range(1_400_000)],
    "array of objects": lambda: np.array([str(n) * 3 for n in range(400_000)], dtype=object),
    # The last: the interpreter keeps much of what these have taken.
    "objects": lambda: {number: Thing(number) for number in range(100_000)},
}
def make(name):
    return MAKERS[name]()
def fail_with(name):
    raise ValueError(make(name))
"""

# What is left of this with a pool in it is some 70 MiB.
SMALL_LIMIT_BYTES = 160 << 20


def run_small(code: str, *, every: bool = True) -> str:
    code = f"{START}{SHAPES}\nevery = {every}\n{code}"
    with control_group(memory_bytes=SMALL_LIMIT_BYTES) as group:
        return group.run(code, timeout_s=110)


# Every way with every shape takes seconds: every run has each shape in one way, in turn.
IN_TURN_AND_ALL = pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=[pytest.mark.slow])]
)


@with_gil
@IN_TURN_AND_ALL
def test_arguments_of_many_shapes_do_not_end_the_program(every: bool) -> None:
    """By position, by keyword, in a map, as what a function refers to."""
    assert run_small(
        """
with safepool.ProcessPool(1) as pool:
    pool.submit(abs, -1).result(60)
    for turn, name in enumerate(MAKERS):
        value = make(name)
        ways = [
            lambda: pool.submit(size, value).result(60),
            lambda: pool.submit(size, value=value).result(60),
            lambda: next(pool.map(size, [value])),
        ]
        for number, way in enumerate(ways):
            if not every and number != turn % len(ways):
                continue
            try:
                way()
            except (MemoryLimitError, WorkerDiedError) as error:
                # Some are refused by the worker, or end it, when it makes them again.
                assert isinstance(error, MemoryLimitError) or error.oom, (name, number, error)
            except TypeError as error:  # a Holder has no len()
                assert name == "bytes in dataclasses", error
            error = None
            assert pool.submit(abs, -3).result(60) == 3
        value = None
    print("survived")
""",
        every=every,
    ).endswith("survived")


def test_results_of_many_shapes_do_not_end_the_program() -> None:
    """The call fails alone; the error says that it is memory, and how much."""
    assert run_small("""
with safepool.ProcessPool(1) as pool:
    for name in MAKERS:
        for function in (make, fail_with) if name in ("bytes", "bytes in a list") else (make,):
            future, others = pool.submit(function, name), [pool.submit(abs, -n) for n in range(4)]
            error = future.exception(60)
            if isinstance(error, WorkerDiedError):
                assert error.oom, (name, error)
            elif isinstance(error, MemoryLimitError):
                assert error.wanted_bytes > error.left_bytes, (name, error)
            else:
                assert error is None or function is fail_with, (name, error)
            future = error = None
            assert [other.result(60) for other in others] == [0, 1, 2, 3], name
    print("survived")
""").endswith("survived")


@with_gil
@IN_TURN_AND_ALL
def test_many_small_results_that_are_kept_do_not_end_the_program(every: bool) -> None:
    """Refused from the one on that does not fit, by submit and by map; tiny ones never."""
    printed = run_small(
        """
def text(number): return b"%d" % number + b"x" * 10_000
def parts(number): return [(number, n, str(n)) for n in range(100)]
with safepool.ProcessPool(1) as pool:
    count = 12_000
    for function in (text, parts) if every else (text,):
        kept, error = [], None
        try:
            for result in pool.map(function, range(count)):
                kept.append(result)
        except MemoryLimitError as problem:
            error = problem
        assert error is not None and 500 < len(kept) < count, (function, error, len(kept))
        assert error.wanted_bytes > error.left_bytes and error.limit_bytes == 160 * M
        assert kept[7] == function(7)
        kept = result = error = None
        # What was let go is there again, if not for the very next call.
        errors = (pool.submit(function, 0).exception(60) for _ in range(10_000))
        assert None in errors
    for function in (text, parts) if every else (parts,):
        futures = [pool.submit(function, number) for number in range(count)]
        kinds = [type(future.exception(60)).__name__ for future in futures]
        assert kinds.count("NoneType") > 500 and kinds.count("MemoryLimitError") > 500, kinds[-1]
        assert futures[7].result() == function(7)
        # A number takes less than the error in its place.
        assert pool.submit(abs, -3).result(60) == 3
        futures = None
        errors = (pool.submit(function, 0).exception(60) for _ in range(10_000))
        assert None in errors
    print("survived")
""",
        every=every,
    )
    assert printed == "survived"


def test_small_results_that_wait_for_their_reader_are_not_computed_ahead_of_it() -> None:
    """And all come. Each of the two takes more than the group has."""
    printed = run_small("""
import support_inside as inside
def text(number): return b"%d" % number + b"x" * 10_000
def parts(number): return [(number, n, str(n)) for n in range(100)]
with safepool.ProcessPool(2) as pool:
    for function, items in ((text, range(16_000)), (parts, iter(range(16_000)))):
        results = pool.map(function, items)
        assert next(results) == function(0)
        while not inside.waits_for_its_reader(pool):
            time.sleep(0.01)
        assert sum(1 for result in results) == 15_999
    print("survived")
""")
    assert printed == "survived"


def test_an_initializer_that_does_not_fit_breaks_the_pool_alone() -> None:
    """An array, what is pickled in one piece, and what the pickler finds bit by bit."""
    code = """
for make in (lambda: ones(300), lambda: [blob(1) for _ in range(260)]):
    value = make()
    with safepool.ProcessPool(2, initializer=size, initargs=(value,)) as pool:
        error = pool.submit(abs, -1).exception(60)
        print(type(error).__name__, type(error.__cause__).__name__)
    del value, error
"""
    with control_group(memory_bytes=LIMIT_BYTES) as group:
        printed = group.run(START + code, timeout_s=110)
        assert printed.split("\n") == ["PoolBrokenError MemoryLimitError"] * 2


def scores(_: object) -> tuple[int, int]:
    """Return this worker's and that of what a task starts."""
    child = subprocess.run(["cat", SCORE], capture_output=True, text=True, check=True)
    return int(SCORE.read_text()), int(child.stdout)


@pytest.mark.parametrize("method", [None, "loky", "spawn", "forkserver", "fork"])
@pytest.mark.filterwarnings("ignore:.*fork")
def test_the_kernel_takes_a_worker_first(method: str | None) -> None:
    """And what a task has started; then a server, and the program last: its number stays."""
    before = int(SCORE.read_text())
    expected = min(1000, before + 1000)
    with ProcessPool(1, method) as pool:
        assert pool.submit(scores, 0).result(timeout=60) == (expected, expected)
        if method is None:
            servers = {Path(f"/proc/{pid}/oom_score_adj") for pid in forkserver.running()}
            assert {int(file.read_text()) for file in servers} == {(before + expected) // 2}
    assert int(SCORE.read_text()) == before


# One row per number of the program: what its servers and its workers have.
SCORES = {-997: (-497, 3), -500: (0, 500), 0: (500, 1000), 300: (650, 1000), 1000: (1000, 1000)}


@pytest.mark.parametrize("score", SCORES)
def test_numbers_are_relative_to_the_programs(
    score: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the machine's root may lower its own, so the file is not the kernel's here."""
    file = tmp_path / "oom_score_adj"
    file.write_text(f"{score}\n")
    monkeypatch.setattr(main, "_OOM_SCORE", str(file))
    main.be_taken_before_the_program(server=True)
    of_server = int(file.read_text())
    main.be_taken_before_the_program()  # in a fork of the server
    of_worker = int(file.read_text())

    assert (of_server, of_worker) == SCORES[score]


def test_a_number_that_is_higher_already_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the program has imported in the server may have raised it."""
    file = tmp_path / "oom_score_adj"
    file.write_text("-900\n")
    monkeypatch.setattr(main, "_OOM_SCORE", str(file))
    main.be_taken_before_the_program(server=True)
    file.write_text("700\n")
    main.be_taken_before_the_program()

    assert int(file.read_text()) == 700


def test_where_the_number_cannot_be_written_a_pool_works(tmp_path: Path) -> None:
    """A sandbox without the file, or with one that is read-only."""
    code = """
import sys, safepool
from safepool.workers import main

if sys.platform == "linux":
    from safepool.workers import forkserver
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
