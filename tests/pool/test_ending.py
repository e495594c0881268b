"""How a worker ended: what its error, its line in the log, the trace and the pool make of it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from support_core import ending

from safepool import MemoryExceeded, TaskTimeoutError, WorkerDiedError
from safepool.errors import OutOfMemory
from safepool.pool.calls.tasks import PoolFuture, Task
from safepool.pool.core.ending import Lost, Stage
from safepool.pool.core.policy import Policy

pytestmark = pytest.mark.unit

OVER = TaskTimeoutError(7, 1.5, "module.f", "")
TOO_MUCH = MemoryExceeded(limit_bytes=1 << 20, held_bytes=5 << 20, born_bytes=0, source="statm")


def task() -> Task:
    return Task(PoolFuture(), (abs, (-1,), {}), "module.f", Policy())


FAILED = Lost(task(), 0, begun=True, again=None)
SENT = Lost(task(), 0, begun=False, again=None)
AGAIN = FAILED._replace(again=task())

# What is known --> the level of its line and how that ends, and what holds of it.
ROWS: dict[str, tuple[dict[str, Any], str, str, set[str]]] = {
    "while idle": ({}, "WARNING", " while it ran nothing", {"died", "breaks"}),
    "before its first task": (
        {"stage": Stage.READY},
        "WARNING",
        " before it began a task",
        {"died", "breaks", "was_for_nothing"},
    ),
    "before it was initialized": (
        {"stage": Stage.STARTING},
        "WARNING",
        " before it was initialized",
        {"died", "breaks", "was_for_nothing"},
    ),
    "while it read": (
        {"stage": Stage.READING, "reading": "module.f"},
        "WARNING",
        " while it read arguments of module.f",
        {"died", "breaks", "was_of_use"},
    ),
    "with a call": ({"lost": (FAILED,)}, "DEBUG", ")", {"died", "breaks", "was_of_use"}),
    "with its first call": (
        {"lost": (FAILED,), "stage": Stage.READY},
        "DEBUG",
        ")",
        {"died", "breaks", "was_of_use"},
    ),
    "with a call that is run again": ({"lost": (AGAIN,)}, "DEBUG", ")", {"died", "was_of_use"}),
    "with a call, and one that is run again": (
        {"lost": (FAILED, AGAIN)},
        "DEBUG",
        ")",
        {"died", "breaks", "was_of_use"},
    ),
    "as it was told": ({"dismissed": True, "exitcode": 0}, "DEBUG", "code 0", set()),
    "as it was told, before it was ready": (
        {"dismissed": True, "exitcode": 0, "stage": Stage.STARTING},
        "DEBUG",
        "code 0",
        set(),
    ),
    "for a time that was over": (
        {"condemned": OVER, "by_pool": True, "lost": (FAILED,)},
        "DEBUG",
        "(sent by the pool)",
        {"died", "was_of_use"},
    ),
    "for its memory": (
        {"exceeded": TOO_MUCH, "by_pool": True, "lost": (FAILED,)},
        "DEBUG",
        "was killed by the pool for its memory",
        {"died", "breaks", "was_of_use"},
    ),
    "with the pool": (
        {"pool_ends": True, "dismissed": True, "by_pool": True, "lost": (FAILED,)},
        "DEBUG",
        "(sent by the pool)",
        {"died", "was_of_use"},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_an_ending_means(name: str) -> None:
    facts, level, end, true = ROWS[name]
    found = ending(**facts)
    assert found.line[0] == logging.getLevelName(level)
    assert found.line[1].startswith("worker 7 ")
    assert found.line[1].endswith(end)
    properties = {"died", "was_of_use", "was_for_nothing", "breaks"}
    assert {name for name in properties if getattr(found, name)} == true


# What is known, which call --> the trace's word, the level of its line, and what that holds.
CALLS: dict[str, tuple[dict[str, Any], Lost, str, str, str]] = {
    "died": ({}, FAILED, "died", "WARNING", "while it ran module.f"),
    "on its way": ({}, SENT, "died", "WARNING", "before it began module.f"),
    "run again": ({}, AGAIN, "retried", "WARNING", "while it ran module.f, which is run again"),
    "with too much": ({"exceeded": TOO_MUCH}, FAILED, "died", "WARNING", "it held 5 MiB, and"),
    "run again after too much": (
        {"exceeded": TOO_MUCH},
        AGAIN,
        "retried",
        "WARNING",
        "for its memory while it ran module.f, which is run again",
    ),
    "timed out": ({"condemned": OVER}, FAILED, "timed out", "DEBUG", "module.f"),
    "cancelled": (
        {"condemned": RuntimeError("cancelled")},
        FAILED,
        "cancelled",
        "DEBUG",
        "module.f",
    ),
    "with the pool": ({"pool_ends": True}, FAILED, "ended", "DEBUG", "module.f"),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_an_ending_means_for_a_call(name: str) -> None:
    facts, lost, outcome, level, part = CALLS[name]
    found = ending(**facts, lost=(lost,))
    assert found.outcome_of(lost) == outcome
    error = None if lost.again is not None else found.error_of(lost)
    assert found.line_of(lost, error)[0] == logging.getLevelName(level)
    assert part in found.line_of(lost, error)[1]


def test_the_error_of_a_call_holds_what_is_known() -> None:
    fault = OSError("unreadable")
    oom = OutOfMemory(
        kills_before=0, kills=1, source="x", limit_bytes=None, used_bytes=None, group="/"
    )
    found = ending(exitcode=-11, fault=fault, stack="File x", lost=(SENT,), oom=oom, by_pool=True)
    error = found.error_of(SENT)
    assert isinstance(error, WorkerDiedError)
    assert (error.pid, error.exitcode, error.task) == (7, -11, "module.f")
    assert (error.stack, error.begun, error.__cause__) == ("File x", False, fault)
    assert (error.oom, error.by_pool, error.exceeded) == (oom, True, None)
    assert found.error_of(SENT) is not error
    assert ending(oom=oom).how != ending().how


def test_the_error_of_a_call_whose_time_was_over_has_the_stack() -> None:
    error = ending(condemned=OVER, stack="File x").error_of(FAILED)
    assert isinstance(error, TaskTimeoutError)
    assert (error.pid, error.timeout_s, error.stack) == (7, 1.5, "File x")
