"""What workers log is handled by the program's loggers, once; what a pool logs itself."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import support_logging as support
import support_tasks as tasks

from safepool import ProcessPool, WorkerDiedError
from safepool.pool.core import starts
from safepool.pool.shell import records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def kept() -> Iterator[support.Kept]:
    """A handler of the program's root logger, which wants everything from INFO on."""
    handler = support.Kept()
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler
    root.setLevel(level)
    root.removeHandler(handler)


@pytest.fixture
def levels() -> Iterator[Callable[[str, int], None]]:
    """Set levels of loggers for one test."""
    before: dict[str, int] = {}

    def set_level(name: str, level: int) -> None:
        before.setdefault(name, logging.getLogger(name).level)
        logging.getLogger(name).setLevel(level)

    yield set_level
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def said(kept: support.Kept, name: str = "support.logging") -> list[str]:
    return [record.getMessage() for record in kept.records if record.name == name]


# One row per kind of record: what runs, with which arguments, and what the record then has.
RECORDS: dict[str, tuple[Callable[..., object], tuple[Any, ...], dict[str, Any], dict[str, Any]]]
RECORDS = {
    "plain": (support.say, ("hello",), {}, {"message": "hello", "levelname": "WARNING"}),
    "with arguments": (support.say, ("%s of %d", "one", 2), {}, {"message": "one of 2"}),
    "an argument that cannot be pickled": (
        support.say,
        ("%r", support.Word("a word")),
        {},
        {"message": "'a word'"},
    ),
    "a message that is no text": (support.say, (("a", 1),), {}, {"message": "('a', 1)"}),
    "a message that is nearly text": (
        support.say,
        (support.Word("word"),),
        {},
        {"message": "word"},
    ),
    "extra": (
        support.say,
        ("x",),
        {"number": 1, "table": {"a": [1, 2]}},
        {"number": 1, "table": {"a": [1, 2]}},
    ),
    "extra that cannot be unpickled here": (
        support.say,
        ("x",),
        {"there": support.NotHere(-1)},
        {"there": "in the worker"},
    ),
    "a percent sign": (support.say, ("100 %",), {}, {"message": "100 %"}),
    "another level": (
        support.say,
        ("x",),
        {"level": logging.CRITICAL},
        {"levelno": logging.CRITICAL, "levelname": "CRITICAL"},
    ),
    "in a thread": (
        support.say_in_a_thread,
        ("x",),
        {},
        {"message": "x", "threadName": "a thread of the task"},
    ),
    "where it was": (
        support.say,
        ("x",),
        {},
        {"funcName": "say", "module": "support_logging", "filename": "support_logging.py"},
    ),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_arrives_as_it_was_logged(case: str, kept: support.Kept) -> None:
    function, arguments, keywords, expected = RECORDS[case]
    with ProcessPool(1) as pool:
        worker = pool.submit(tasks.pid).result(timeout=30)
        pool.submit(function, *arguments, **keywords).result(timeout=30)

    (record,) = [record for record in kept.records if record.name == "support.logging"]
    record.message = record.getMessage()
    assert {name: getattr(record, name) for name in expected} == expected
    assert type(record.msg) is str
    assert record.process == worker != os.getpid()
    assert record.processName != "MainProcess"
    assert kept.threads == {"safepool-handlers"}


# One row per value that cannot travel: how a task makes it, and what arrives instead.
STUBBORN: dict[str, tuple[Callable[[int], object], str]] = {
    "cannot be pickled": (lambda _: support.Stubborn(), "<stubborn>"),
    "cannot be shown": (lambda _: support.Hostile(), "(not shown: not shown)"),
    "cannot be unpickled": (
        support.NotHere,
        "(cannot be unpickled: not in the program)",
    ),
}


@pytest.mark.parametrize("case", STUBBORN)
def test_what_cannot_travel_is_told_in_words(case: str, kept: support.Kept) -> None:
    make, words = STUBBORN[case]
    program = os.getpid()
    with ProcessPool(1) as pool:
        pool.submit(lambda: support.say("x", value=make(program))).result(timeout=30)

    (record,) = [record for record in kept.records if record.name == "support.logging"]
    assert vars(record)["value"] == words


def test_an_exception_arrives_as_text_that_formatters_add(kept: support.Kept) -> None:
    with ProcessPool(1) as pool:
        pool.submit(support.say_that_it_failed).result(timeout=30)
        pool.submit(support.say_where).result(timeout=30)

    failed, where = [record for record in kept.records if record.name == "support.logging"]
    text = logging.Formatter("%(message)s").format(failed)
    assert text.startswith("it failed\nTraceback (most recent call last):\n")
    assert text.endswith("KeyError: 'on purpose'")
    assert failed.getMessage() == "it failed"
    assert "in say_where" in logging.Formatter("%(message)s").format(where)


def test_an_argument_that_raises_costs_its_record_only(
    kept: support.Kept, capfd: pytest.CaptureFixture[str]
) -> None:
    """As anywhere: logging tells it on stderr, and the task goes on."""
    with ProcessPool(1) as pool:
        pool.submit(lambda: support.say("%s", support.Hostile())).result(timeout=30)
        pool.submit(support.say, "after").result(timeout=30)

    assert said(kept) == ["after"]
    assert "--- Logging error ---" in capfd.readouterr().err


# One row per logger that a plain handler of the root would miss.
LOGGERS: dict[str, dict[str, Any]] = {
    "does not propagate": {"propagate": False},
    "has a NullHandler": {"null": True},
    "has a NullHandler and does not propagate": {"null": True, "propagate": False},
}


@pytest.mark.parametrize("case", LOGGERS)
def test_what_no_handler_of_the_worker_takes_arrives(case: str, kept: support.Kept) -> None:
    with ProcessPool(1) as pool:
        pool.submit(support.say_by, "some.library", "hello", **LOGGERS[case]).result(timeout=30)

    assert said(kept, "some.library") == ["hello"]


def test_an_initializer_that_configures_logging_has_its_way(
    kept: support.Kept, tmp_path: Path
) -> None:
    """As in a standard pool: the worker's handlers take the records, and nobody does twice."""
    path = tmp_path / "worker.log"
    with ProcessPool(1, initializer=support.configure, initargs=(str(path),)) as pool:
        pool.submit(support.say, "hello", level=logging.INFO).result(timeout=30)

    assert path.read_text() == "hello\n"
    assert said(kept) == []


def test_records_of_an_initializer_arrive(kept: support.Kept) -> None:
    with ProcessPool(1, initializer=support.say, initargs=("initialized",)) as pool:
        pool.submit(tasks.pid).result(timeout=30)

    assert said(kept) == ["initialized"]


def test_records_arrive_before_the_result_of_their_task(
    kept: support.Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever way the result takes: short tasks that do not log lie on the board between."""
    # A machine that has much else to do keeps the thread of the handlers waiting.
    monkeypatch.setattr(records, "_PATIENCE_S", 30.0)
    late: list[int] = []

    def check(number: int) -> None:
        if number % 3 and str(number) not in seen:
            late.append(number)

    seen: set[str] = set()
    kept.emit = lambda record: seen.add(record.getMessage())  # type: ignore[method-assign]
    with ProcessPool(2) as pool:
        for number in range(1500):
            future = pool.submit(support.say_number_and_return, number)
            future.add_done_callback(lambda done: check(done.result()))
        for number in pool.map(support.say_number_and_return, range(2000, 4000)):
            check(number)

    assert late == []
    assert {int(text) for text in seen if text.isdecimal()} >= {
        number for number in [*range(1500), *range(2000, 4000)] if number % 3
    }


def test_what_was_logged_before_a_worker_died_is_there(kept: support.Kept) -> None:
    with ProcessPool(1) as pool:
        error = pool.submit(support.say_and_end, "last words").exception(timeout=30)

    assert isinstance(error, WorkerDiedError)
    assert said(kept) == ["last words"]


def test_levels_are_those_of_the_program(levels: Callable[[str, int], None]) -> None:
    """Nothing is made that nobody wants."""
    levels("", logging.ERROR)
    levels("some.library", logging.DEBUG)
    with ProcessPool(1) as pool:
        found = pool.submit(support.wanted, "", "some.library.part", "other").result(timeout=30)
        assert found == [logging.ERROR, logging.DEBUG, logging.ERROR]


def test_a_changed_level_holds_here_at_once_and_there_for_the_next_worker(
    kept: support.Kept, levels: Callable[[str, int], None]
) -> None:
    with ProcessPool(1, max_tasks_per_child=2) as pool:
        assert pool.submit(support.is_debug_wanted, "support.logging").result(timeout=30) is False
        levels("support.logging", logging.ERROR)
        pool.submit(support.say, "not wanted any more").result(timeout=30)
        levels("support.logging", logging.DEBUG)
        assert pool.submit(support.is_debug_wanted, "support.logging").result(timeout=30) is True
        pool.submit(support.say, "wanted", level=logging.DEBUG).result(timeout=30)

    assert said(kept) == ["wanted"]


def test_what_is_disabled_here_is_not_made_there(kept: support.Kept) -> None:
    logging.disable(logging.WARNING)
    try:
        with ProcessPool(1) as pool:
            pool.submit(support.say, "not this").result(timeout=30)
            pool.submit(support.say, "but this", level=logging.ERROR).result(timeout=30)
    finally:
        logging.disable(logging.NOTSET)

    assert said(kept) == ["but this"]


@pytest.mark.skipif(sys.platform == "win32", reason="records wait for the answer there")
def test_a_slow_handler_never_holds_up_a_task(kept: support.Kept, tmp_path: Path) -> None:
    """20 MB are logged while the first record is still being handled; the rest is counted."""
    path, count = tmp_path / "logged", 20_000

    def wait(record: logging.LogRecord) -> None:
        if not kept.records:
            tasks.wait_for(str(path))
        kept.records.append(record)

    kept.emit = wait  # type: ignore[method-assign]
    with ProcessPool(1) as pool:
        future = pool.submit(support.say_until_there, str(path), count, 1000)
        assert future.result(timeout=60) == count

    arrived, reports = said(kept), said(kept, "safepool")
    numbers = [int(text.split()[0]) for text in arrived]
    assert numbers == sorted(numbers)
    counts = (re.search(r"(\d+) (?:log )?records", text) for text in reports)
    dropped = [int(count[1]) for count in counts if count]
    assert len(numbers) + sum(dropped) == count
    assert sum(dropped) > 0
    assert 0 < len(numbers) < 5000


@pytest.mark.parametrize("count", [500])
def test_a_signals_handler_may_log_in_the_middle_of_logging(
    count: int, kept: support.Kept
) -> None:
    with ProcessPool(1) as pool:
        signals = pool.submit(support.say_during_signals, count).result(timeout=60)
        assert pool.submit(len, bytes(1_000_000)).result(timeout=30) == 1_000_000

    assert signals > 0
    assert len([text for text in said(kept) if text == "signal"]) == signals
    assert len([text for text in said(kept) if text != "signal"]) == count


def test_threads_that_log_beside_tasks_do_not_mix_with_answers(kept: support.Kept) -> None:
    """Large answers and records from four threads, all on one channel."""
    with ProcessPool(1) as pool:
        pool.submit(support.leave_threads_that_log, 4, 200).result(timeout=30)
        for size in range(100_000, 160_000, 1000):
            assert len(pool.submit(bytes, size).result(timeout=30)) == size
        deadline = time.monotonic() + 30
        while len(said(kept)) < 800 and time.monotonic() < deadline:
            pool.submit(tasks.pid).result(timeout=30)

    assert len(said(kept)) == 800


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_fork_of_a_task_writes_nothing_on_the_channel(
    kept: support.Kept, tmp_path: Path
) -> None:
    """Its records go to stderr, as those of any process without handlers."""
    path = tmp_path / "stderr"
    with ProcessPool(1) as pool:
        assert pool.submit(support.fork_while_threads_log, str(path)).result(timeout=60) == 0
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9

    assert len(said(kept)) == 200
    assert path.read_text().splitlines().count("from a child") == 20


def test_a_handler_that_raises_costs_nothing(
    kept: support.Kept, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither for a worker's record nor for one of the pool's own."""

    def refuse(record: logging.LogRecord) -> None:
        raise RuntimeError(f"not {record.getMessage()}")

    kept.emit = refuse  # type: ignore[method-assign]
    with ProcessPool(1) as pool:
        pool.submit(support.say, "handled").result(timeout=30)
        with pytest.raises(WorkerDiedError):
            pool.submit(tasks.be_killed).result(timeout=30)
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9

    told = capsys.readouterr().err
    assert told.count("--- Logging error ---") == 2
    assert "RuntimeError: not handled" in told


SCRIPT = """
import logging, sys, warnings
import safepool

logging.basicConfig(filename=sys.argv[2], format="%(name)s %(message)s")
class OnceMore(logging.Filter):
    def filter(self, record):
        record.msg = "own " + record.msg
        return True

own = logging.getLogger("own")
own.propagate = False
own.addFilter(OnceMore())
own.addHandler(logging.FileHandler(sys.argv[2]))

def task(number):
    own.warning("%d", number)
    logging.getLogger("other").warning("other %d", number)

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with safepool.ProcessPool(1, sys.argv[1]) as pool:
        pool.submit(task, 1).result()
        list(pool.map(task, [2]))
"""


@pytest.mark.parametrize("method", ["safepool", "loky", "spawn", "forkserver", "fork"])
def test_handlers_that_a_worker_is_born_with_do_not_handle_twice(
    method: str, tmp_path: Path
) -> None:
    """A fork inherits them, and spawn makes them again when it imports the script.

    Filters of loggers neither.
    """
    script, path = tmp_path / "script.py", tmp_path / "log"
    script.write_text(SCRIPT)
    subprocess.run([sys.executable, str(script), method, str(path)], timeout=60, check=True)

    assert path.read_text().splitlines() == ["own 1", "other other 1", "own 2", "other other 2"]


def test_a_pool_in_a_worker_passes_records_on(kept: support.Kept) -> None:
    def outer() -> None:
        with ProcessPool(1) as pool:
            pool.submit(support.say, "from far below").result(timeout=30)

    with ProcessPool(1) as pool:
        pool.submit(outer).result(timeout=60)

    assert said(kept) == ["from far below"]


# What the pool itself logs.


def _dies(pool: ProcessPool) -> None:
    pool.submit(tasks.be_killed).exception(timeout=30)


def _dies_and_is_run_again(pool: ProcessPool) -> None:
    pool._policy = type(pool._policy)(timeout_s=None, retries=1)
    pool.submit(tasks.be_killed).exception(timeout=30)


def _dies_idle(pool: ProcessPool) -> None:
    os.kill(pool.submit(tasks.pid).result(timeout=30), signal.SIGKILL)
    deadline = time.monotonic() + 30
    while pool._processes and time.monotonic() < deadline:
        time.sleep(0.01)


def _works(pool: ProcessPool) -> None:
    pool.submit(tasks.square, 2).result(timeout=30)


def _times_out(pool: ProcessPool) -> None:
    pool._policy = type(pool._policy)(timeout_s=0.1, retries=0)
    pool.submit(time.sleep, 30).exception(timeout=30)


def _is_resized(pool: ProcessPool) -> None:
    pool.resize(2)
    pool.resize(2)


def _cannot_be_initialized(_: ProcessPool) -> None:
    with ProcessPool(1, initializer=tasks.be_killed) as pool:
        pool.submit(tasks.pid).exception(timeout=60)


# One row per event: what happens, and what is logged of it from INFO on, in order; N stands for
# numbers.
EVENTS: dict[str, tuple[Callable[[ProcessPool], None], list[tuple[str, str]]]] = {
    "it works": (_works, []),
    "a worker dies in a task": (
        _dies,
        [("WARNING", "worker N was killed by SIGKILL (often the kernel's out-of-memory killer")],
    ),
    "and the task is run again": (
        _dies_and_is_run_again,
        [
            ("WARNING", "worker N was killed by SIGKILL (often the kernel's out-of-memory killer"),
            ("WARNING", "worker N was killed by SIGKILL (often the kernel's out-of-memory killer"),
        ],
    ),
    "a worker dies idle": (_dies_idle, [("WARNING", "worker N was killed by SIGKILL")]),
    "a task exceeds its time": (_times_out, []),
    "it is resized by hand": (
        _is_resized,
        [("INFO", "resize(): N workers instead of N")],
    ),
    "workers cannot be initialized": (
        _cannot_be_initialized,
        [("WARNING", "worker N was killed by SIGKILL")] * 20,
    ),
}


@pytest.mark.parametrize("event", EVENTS)
def test_what_a_pool_logs(event: str, kept: support.Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for what a program's owner wants to know, and none for what is as it should be."""
    monkeypatch.setattr(starts, "_MOST_PAUSE_NS", 50_000_000)
    happen, expected = EVENTS[event]
    with ProcessPool(1) as pool:
        happen(pool)

    own = [record for record in kept.records if record.name == "safepool"]
    found = [(record.levelname, _without_numbers(record.getMessage())) for record in own]
    assert [level for level, _ in found] == [level for level, _ in expected]
    for (_, text), (_, begin) in zip(found, expected, strict=True):
        assert text.startswith(begin)
    # Not the wrapper's.
    assert {record.module for record in own} <= {"losses", "loop", "size", "staff"}


def _without_numbers(text: str) -> str:
    return " ".join("N" if word.isdecimal() else word for word in text.split())


def test_starts_and_ends_are_there_for_who_asks(
    kept: support.Kept, levels: Callable[[str, int], None]
) -> None:
    with ProcessPool(1) as pool:  # it has the fork server started, if none runs
        pool.submit(tasks.pid).result(timeout=30)
    levels("safepool", logging.DEBUG)
    with ProcessPool(1) as pool:
        pool.submit(tasks.pid).result(timeout=30)

    assert [_without_numbers(text) for text in said(kept, "safepool")] == [
        "worker N started",
        "worker N ended with exit code N",
    ]


def test_what_is_logged_without_a_logger_is_the_programs_too(
    kept: support.Kept, capfd: pytest.CaptureFixture[str]
) -> None:
    """``logging.warning()`` configures logging where there is no handler; a worker has none."""
    with ProcessPool(1) as pool:
        assert pool.submit(support.say_by_the_module, "first").result() == []
        pool.submit(support.say, "second").result()

    assert said(kept, "root") == ["first"]
    assert said(kept) == ["second"]
    assert capfd.readouterr().err == ""


def test_a_worker_may_still_configure_logging(tmp_path: Path) -> None:
    """After what was logged before, too: the root logger has no handler that would keep it off."""
    path = tmp_path / "log"
    with ProcessPool(1) as pool:
        pool.submit(support.say_by_the_module, "before").result()
        pool.submit(support.configure, str(path)).result()
        pool.submit(support.say, "after").result()

    assert path.read_text() == "after\n"


def test_a_mock_of_get_logger_is_not_used() -> None:
    """Tests replace it; the pool's modules may be imported only then."""
    program = (
        "import unittest.mock, safepool\n"
        "with unittest.mock.patch('logging.getLogger'):\n"
        "    with safepool.ProcessPool(1) as pool:\n"
        "        print(pool.submit(abs, -1).result(60))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.stderr) == ("1\n", "")
