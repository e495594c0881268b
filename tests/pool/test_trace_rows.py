"""What a trace makes of answers and times that come apart, and of a disk that does not answer."""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
import support_core

from safepool.errors import TraceFileError
from safepool.pool.core.events import Fed
from safepool.pool.tracing import costs, file
from safepool.pool.tracing.events import Calls, Events
from safepool.pool.tracing.file import TraceFile
from safepool.pool.tracing.rows import Row, Settled
from safepool.transport.frames import CorruptFrameError
from safepool.workers.timed import Timed, read_times

if TYPE_CHECKING:
    from pathlib import Path


class Work:
    """Stands for the calls of a map."""

    name = "work"
    again = 0
    attempt = 1
    run: Any = None


class Noted(Row):
    """A row that keeps what it adds, as begin, end, and number of calls."""

    def __init__(self) -> None:
        super().__init__(1, None, 0)  # type: ignore[arg-type]
        self.added: list[tuple[int, int, int]] = []

    def add(self, done: Settled, begin_ns: int, end_ns: int, *_: int) -> None:  # type: ignore[override]
        self.added.append((begin_ns, end_ns, done.count))
        self._end_ns = end_ns


def settled(first: int, count: int) -> Settled:
    return Settled(first, count, Work(), 0, "returned", None)  # type: ignore[arg-type]


def timed(first: int, calls: int, begin_ns: int, end_ns: int) -> Timed:
    return Timed(first, calls, begin_ns, end_ns, 0, 0)


# One row per order and cut of answers and times: what comes, and which events there are.
JOINED: dict[str, tuple[list[Settled | Timed], list[tuple[int, int, int]]]] = {
    "answer, times": ([settled(0, 2), timed(0, 2, 10, 30)], [(10, 30, 2)]),
    "times, answer": ([timed(0, 2, 10, 30), settled(0, 2)], [(10, 30, 2)]),
    "answers in two": (
        [settled(0, 1), timed(0, 3, 10, 40), settled(1, 2)],
        [(10, 20, 1), (20, 40, 2)],
    ),
    "times in two": (
        [settled(0, 4), timed(0, 2, 0, 20), timed(2, 2, 20, 60)],
        [(0, 20, 2), (20, 60, 2)],
    ),
    "times of a call that was given up": (
        [timed(0, 1, 0, 10), timed(1, 1, 10, 20), settled(1, 1)],
        [(10, 20, 1)],
    ),
    "times that begin before the answer": (
        [timed(0, 4, 0, 40), settled(2, 2)],
        [(20, 40, 2)],
    ),
    "an answer without times": (
        [settled(0, 1), settled(1, 1), timed(1, 1, 10, 20)],
        [(0, 10, 1), (10, 20, 1)],
    ),
}


@pytest.mark.parametrize("case", JOINED)
def test_answers_and_times_are_joined(case: str) -> None:
    came, expected = JOINED[case]
    row = Noted()
    for one in came:
        if isinstance(one, Timed):
            row.time([one])
        else:
            # It is changed.
            row.settle(settled(one.first, one.count))
    assert row.added == expected
    assert not row._settled


def test_times_that_never_came_are_estimated_at_the_end() -> None:
    row = Noted()
    row.settle(settled(0, 1))
    row.settle(settled(1, 1))
    row._write = lambda: None  # type: ignore[method-assign]
    row.end(0, 40, [])
    assert row.added == [(0, 20, 1), (20, 40, 1)]


def test_what_is_no_frame_of_times_is_refused() -> None:
    with pytest.raises(CorruptFrameError):
        read_times([b"short"])


def test_when_a_call_was_queued_is_known_or_not() -> None:
    run: Any = support_core.run_of()
    span = support_core.span_of(run, 5)
    assert costs.queued_ns(span, 0) is None
    for count in (2, 3):
        costs.note_brought(Fed(run, [()] * count, last=False))
    assert [place for place, _ in run.noted] == [2, 5]
    first, second = (costs.queued_ns(span, place) for place in (1, 4))
    assert first is not None
    assert second is not None
    assert first <= second


def lines(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text().rstrip(",\n]") + "]")
    return found


def test_an_event_of_many_functions_and_outcomes_names_them(tmp_path: Path) -> None:
    events = Events(str(tmp_path / "trace"))
    calls = Calls(0, 9000, "f", "returned", 1, None, 1, 2000, 8000, 3000, 4000, 5000)
    calls.join("f", "returned", 1, None)
    calls.join("g", "raised", 2, "an error")
    calls.join("g", "returned", 1, None)
    events.calls(1, calls)
    for number in range(1100):
        events._quote(f"f{number}")
    assert len(events._quoted) < 1100
    events.close()

    *_, event, _ = lines(tmp_path / "trace")
    args = event["args"]
    assert event["name"] == "2 functions"
    assert args["functions"] == {"f": 2, "g": 3}
    assert args["outcomes"] == {"returned": 3, "raised": 2}
    assert (args["error"], args["calls"], args["waited_us"]) == ("an error", 5, 2)


def test_a_path_that_no_file_can_have_is_an_error() -> None:
    with pytest.raises(TraceFileError):
        TraceFile("a\0b")


def refuse(*_: object) -> None:
    raise OSError("no locks")


def refuse_thread(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_a_file_system_without_locks_is_written_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", refuse)
    opened = Events(str(tmp_path / "trace"))
    opened.close()
    assert lines(tmp_path / "trace")[0]["name"] == "safepool"


def test_without_a_thread_the_lines_are_written_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Events(str(tmp_path / "trace"))
    monkeypatch.setattr(threading.Thread, "start", refuse_thread)
    opened.start(lambda: None)
    monkeypatch.undo()
    opened.add(" " * (file._MANY_BYTES + 1))
    assert os.path.getsize(tmp_path / "trace") > file._MANY_BYTES
    opened.close()


def test_a_disk_that_does_not_answer_keeps_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = Events(str(tmp_path / "trace"))
    descriptor = opened.descriptors()[0]
    goes_on = threading.Event()
    monkeypatch.setattr(file, "_ENDING_S", 0.0)
    opened.start(goes_on.wait)
    opened.add(" " * (file._MANY_BYTES + 1))
    thread: Any = opened._thread
    opened.close()
    assert not opened.ours
    assert "does not answer" in caplog.text
    goes_on.set()
    thread.join(60)
    os.close(descriptor)


def test_a_descriptor_that_the_program_has_closed_is_no_error(tmp_path: Path) -> None:
    opened = Events(str(tmp_path / "trace"))
    opened.write()
    os.close(opened.descriptors()[0])
    opened.close()
    assert not opened.ours
